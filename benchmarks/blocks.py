"""Pages whose figures nobody types: each stands between two marker comments and is written there from result files."""

import re


def filled(text: str, blocks: dict[str, str], page: str) -> str:
    """`text` with each block between `<!-- NAME -->` and `<!-- /NAME -->` written anew. Raises ValueError for a missing
    one."""
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"{page} has no block between <!-- {name} --> and <!-- /{name} -->")
        text = marked.sub(lambda match, block=block: f"{match[1]}\n{block}\n\n{match[2]}", text)
    return text


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    rows = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
