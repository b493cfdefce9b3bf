"""The embedded policies' tokenizers: plain `tokenizers` files that AutoTokenizer loads."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL = [PAD, EOS, UNKNOWN]
CHARACTERS = {"countdown": "0123456789 =:+-*()", "guess": "0123456789-:<>", "keydoor": "\n:.AKBDudlr"}
LENGTHS = {"countdown": 64, "guess": 64, "keydoor": 640, "gym": 512}  # the longest text in tokens
PRINTABLE = ["\n", *map(chr, range(32, 127))]
ALONE = r"[0-9+\-*/()=]"  # arithmetic is done digit by digit
VOCABULARY = 1024


def character_tokenizer(task: str = "countdown") -> PreTrainedTokenizerFast:
    """A token for each character of the texts of `task`; anything else becomes <unk>."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS[task]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # type: ignore[assignment]
    return _loadable(tokenizer, LENGTHS[task])


def phrase_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-pair merges learned from `texts`: what all problems of a data set say becomes a few tokens.

    Digits and operators stand alone, every printable ASCII character is known; anything else becomes <unk>.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ALONE), behavior="isolated")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=PRINTABLE, min_frequency=20, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _loadable(tokenizer, LENGTHS["gym"])


def _loadable(tokenizer: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
    )
