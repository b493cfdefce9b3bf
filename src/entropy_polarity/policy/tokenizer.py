"""The character tokenizer: one token a character, a plain `tokenizers` file that AutoTokenizer loads."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
CHARACTERS = {"countdown": "0123456789 =:+-*()", "games": "0123456789-:<>\n.AKBDudlr", "gym": PRINTABLE}
LENGTHS = {"countdown": 64, "games": 640, "gym": 512}  # the longest text in tokens


def character_tokenizer(task: str = "countdown") -> PreTrainedTokenizerFast:
    """A tokenizer over the characters of "countdown", "games" or "gym"; anything else becomes <unk>."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS[task]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # type: ignore[assignment]
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
