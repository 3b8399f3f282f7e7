"""Checks of models and numbers that do not fit together, before a process is started."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from rlhf_dist.config.deepspeed import read_ds_config
from rlhf_dist.config.hosting import ModelHost, TrainedModel
from rlhf_dist.core.errors import ConfigError, DataError, ModelError
from rlhf_dist.data.rendering import render_conversation, render_prompt
from rlhf_dist.data.tokenizer import NEW_PAD_TOKEN, has_builtin_template, load_tokenizer
from rlhf_dist.models.generation_config import check_generation_config
from rlhf_dist.models.loading import check_causal_lm, check_weights, context_length, load_model_config
from rlhf_dist.models.vocabulary import check_embeddings


def check_model(path: str, max_length_tokens: int, role: str, *, scalar: bool) -> Any:
    """The model's config, if it can hold the run's sequences and its weights are those of such a model.

    Raises:
        ModelError: no model at `path`, weights of other names or shapes, or its context is shorter than `max_length_tokens`.
    """
    config = load_model_config(path)
    if not scalar:
        check_causal_lm(config, role)
        check_generation_config(path)
    check_weights(path, scalar=scalar)
    limit = context_length(config)
    if limit is not None and max_length_tokens > limit:
        raise ModelError(
            f"data.max_length_tokens is {max_length_tokens} but the {role} model at {path!r} has a context of {limit} tokens; "
            f"lower data.max_length_tokens to at most {limit}"
        )
    return config


def check_vocabulary(model: TrainedModel, config: Any, tokenizer: Any) -> None:
    """Raise ModelError where the tokenizer has tokens without an embedding, and the model to be trained is to get none."""
    if not model.resize_embeddings:
        remedy = "set model.resize_embeddings: true to give the model a row for each, or use its own tokenizer"
        check_embeddings(config, tokenizer, "trained", remedy)


def check_micro_batches(model: ModelHost, max_length_tokens: int, role: str, num_sequences: int = 1) -> None:
    """Reject a token budget that one row of a batch may exceed.

    Args:
        model: the hosted model.
        max_length_tokens: of a sequence.
        role: the model's section of the configuration.
        num_sequences: sequences that a row puts into one forward pass (a preference pair: 2).

    Raises:
        ConfigError: micro_batch_tokens is set, and too small.
    """
    budget, needed = model.micro_batch_tokens, num_sequences * max_length_tokens
    if budget is not None and budget < needed:
        why = f"{num_sequences} sequences of a row in one forward pass" if num_sequences > 1 else "one sequence"
        raise ConfigError(
            f"{role}.micro_batch_tokens is {budget} but {why} may take {needed} tokens (data.max_length_tokens is "
            f"{max_length_tokens}); raise the first to at least {needed} or lower the second"
        )


def check_same_tokenizer(policy: Any, path: str, model_config: Any, role: str) -> None:
    """Roles exchange token ids: their tokenizers must be one, and every id must have an embedding."""
    other = load_tokenizer(path)
    if _vocabulary(other) != _vocabulary(policy):
        raise ModelError(
            f"the tokenizer of the {role} model at {path!r} ({len(other)} tokens) is not the policy's ({len(policy)} tokens); "
            "give a model of the policy's family (a value model may start from the policy: value.model_path)"
        )
    check_embeddings(
        model_config, policy, role, "train it from a model whose embeddings were resized (model.resize_embeddings)"
    )


def own_tokenizer(path: str, model_config: Any, policy: Any) -> Any | None:
    """The tokenizer of a reward model that makes other tokens of a conversation than the policy's: by vocabulary or by chat
    template, or since the template writes a finished turn otherwise than it is generated (an empty block of reasoning, as of
    Qwen 3). None where both make the same.

    Raises:
        ModelError: it has no chat template, or tokens without an embedding.
    """
    own = load_tokenizer(path)
    if (_vocabulary(policy), policy.chat_template) == (_vocabulary(own), own.chat_template) and _as_generated(own):
        return None
    if has_builtin_template(own) and not _saves_template(path):
        raise ModelError(
            f"the reward model at {path!r} has no chat template, and the policy has one, so how the reward model is to read a "
            "dialogue is not known; save the template that it was trained with beside it (chat_template.jinja), or, where it "
            "reads the policy's, set ppo.reward_template: policy"
        )
    check_embeddings(model_config, own, "reward", "use the tokenizer that it was trained with")
    return own


def _as_generated(tokenizer: Any) -> bool:
    """Whether the chat template has a finished turn as it is generated: the prompt, then the response."""
    prompt = [{"role": "user", "content": "a"}]
    try:
        before = render_prompt(tokenizer, prompt).text
        whole = render_conversation(tokenizer, [*prompt, {"role": "assistant", "content": "b"}], [1]).text
    except DataError:
        return True  # whatever it needs, the data have
    return whole.startswith(before + "b")


def _saves_template(path: str) -> bool:
    """Whether a chat template is saved there, be it a copy of the built-in one, as runs save it."""
    return bool(AutoTokenizer.from_pretrained(path).chat_template)


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Without the pad token that a reward model may have been given, which no text has."""
    return {name: i for name, i in tokenizer.get_vocab().items() if name != NEW_PAD_TOKEN}


def check_ds_config(model: TrainedModel) -> None:
    """Reject a DeepSpeed file that contradicts its role."""
    if model.ds_config_path is not None:
        read_ds_config(model.ds_config_path, model.zero_stage, model.precision, model.num_ranks)


def check_ranks(batch_size: int, num_ranks: int, name: str, role: str) -> None:
    """Reject a batch that leaves ranks without work at every step."""
    if batch_size < num_ranks:
        raise ConfigError(
            f"{name} is {batch_size} but {role}.num_ranks is {num_ranks}: some ranks would never have work; raise the first "
            "or lower the second"
        )
