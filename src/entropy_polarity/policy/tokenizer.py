"""One token a character, or a known word: a plain `tokenizers` file that AutoTokenizer loads."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORD = "[A-Za-z]{2,}"
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
CHARACTERS = {"countdown": "0123456789 =:+-*()", "games": "0123456789-:<>\n.AKBDudlr", "gym": PRINTABLE}
LENGTHS = {"countdown": 64, "games": 640, "gym": 512}  # the longest text in tokens


def character_tokenizer(task: str = "countdown", words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer over the characters of "countdown", "games" or "gym"; anything else becomes <unk>.

    A word of `words`, letters alone, is one token; the letters of other words become <unk>.
    """
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS[task], *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    pieces = rf"{WORD}|[\s\S]" if words else r"[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTHS[task],
    )
