"""Completions by vLLM, where it is installed: token ids in and token ids out.

vLLM batches on its own. Every completion has a seed of its own, so what else is in a batch changes no draw; its kernels
may round otherwise in another batch, and its draws are not those of transformers.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence

from transformers import AutoConfig, AutoModelForCausalLM

from entropy_polarity.generation import Sampling
from entropy_polarity.support.weights import check_whole


class VllmGenerator:
    """A `Generator` of the model in a folder, in the number format that its configuration names.

    Raises ImportError, with what to install, where vLLM is missing, and ValueError where the file's weights are not
    those of the model (of a quantised one vLLM alone can tell).
    """

    def __init__(self, model: str) -> None:
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ImportError(
                f"--backend vllm needs vLLM ({error}): pip install 'entropy-polarity[vllm]', or --backend transformers"
            ) from error
        if getattr(AutoConfig.from_pretrained(model, trust_remote_code=False), "quantization_config", None) is None:
            check_whole(AutoModelForCausalLM.from_pretrained, model, trust_remote_code=False)
        self._parameters = vllm.SamplingParams
        self.engine = vllm.LLM(model=model, trust_remote_code=False, load_format="safetensors")
        self.tokenizer = self.engine.get_tokenizer()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.batch_sizes: list[int] = []  # vLLM tells none
        self.watch: Callable[[float, int], None] | None = None  # the engine has a bar of its own
        self.context: int | None = self.engine.llm_engine.model_config.max_model_len

    def complete(
        self, prompts: Sequence[list[int]], samples: int, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> list[list[list[int]]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = [
            self._parameters(
                n=samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=max_new_tokens,
                seed=prompt_seed(seed, number),
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        answered = self.engine.generate(asked, parameters, use_tqdm=True)
        return [[list(one.token_ids) for one in request.outputs] for request in answered]


def prompt_seed(seed: int, number: int) -> int:
    """The seed of a prompt's first sample. vLLM adds 1 for each further one: prompts must lie far apart."""
    return int.from_bytes(hashlib.sha256(f"vllm:{seed}:{number}".encode()).digest()[:4])
