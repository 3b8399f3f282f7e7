"""A baseline that a reward model should beat: a linear score of the words of a response.

Logistic regression on the difference of two responses' TF-IDF vectors, without intercept, is the Bradley–Terry model with a
linear reward. scikit-learn comes with the extra `curation`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.near_ties import NearTieRule, pair_margins
from rlhf_dist.core.random import permutation
from rlhf_dist.core.rankings import ranked_pairs
from rlhf_dist.data.datasets import PreferenceDataset

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty that are tried."""
_CHUNK = 512
"""Records that are decoded at once."""


class BagOfWords:
    """Fitted on the training set of a reward model, to be held against it on the same held-out set.

    Pairs weigh what they weigh for the reward model: those of a prompt as much as one, near-ties as their rule says. The
    strength of the penalty is the one that does best on a fifth of the training prompts.
    """

    def __init__(
        self, train: PreferenceDataset, decode: Callable[[Tensor], str], rule: NearTieRule | None = None, seed: int = 0
    ) -> None:
        """`decode`: [n] token ids → text; `rule`: of the near-ties.

        Raises:
            ConfigError: scikit-learn is absent, or no word is in two training responses.
        """
        if find_spec("sklearn") is None:
            raise ConfigError(
                "reward.bag_of_words_baseline needs scikit-learn; pip install 'rlhf-dist[curation]', or set it to false"
            )
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._decode = decode
        # Words of one letter, too: "I" and "a" are words. Both cases as one, single words and pairs of words.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
        )
        texts, first, second, prompt, weight, certain = self._pairs(train, rule)
        try:
            features = self._vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ConfigError(
                f"the bag-of-words baseline finds no word that two training responses share ({error}); set "
                "reward.bag_of_words_baseline to false"
            ) from error
        difference: Any = features[first] - features[second]
        order = permutation(seed, "bag of words", 0, len(train)).numpy()
        held_out = np.isin(prompt, order[: len(train) // 5])
        self.strength = 1.0
        """C, the inverse strength of the penalty."""
        if held_out.any() and not held_out.all():
            own = ~held_out
            losses = []
            for strength in _STRENGTHS:
                model = _fitted(difference[own], weight[own], certain[own], strength)
                scores = model.decision_function(difference[held_out])
                loss = certain[held_out] * np.logaddexp(0, -scores) + (1 - certain[held_out]) * np.logaddexp(0, scores)
                losses.append(float(np.average(loss, weights=weight[held_out])))
            self.strength = _STRENGTHS[int(np.argmin(losses))]
        self._model = _fitted(difference, weight, certain, self.strength)

    def score(self, dataset: PreferenceDataset, indices: Tensor) -> Tensor:
        """[n, K] float64 scores of the records `indices` [n]; 0 where there is no response."""
        texts, present = self._texts(dataset, indices)
        found = torch.from_numpy(self._model.decision_function(self._vectorizer.transform(texts)))
        return torch.zeros(present.shape, dtype=found.dtype).masked_scatter(present, found)

    def _pairs(self, train: PreferenceDataset, rule: NearTieRule | None) -> tuple[Any, ...]:
        """All texts, and of each pair: rows of the better and the worse text, its prompt, weight and certainty."""
        texts: list[str] = []
        columns: list[list[Any]] = [[], [], [], [], []]
        for indices in torch.arange(len(train)).split(_CHUNK):
            batch = train.batch(indices)
            better, worse, weights = ranked_pairs(batch.present, batch.ranks)
            pairs = weights > 0
            certain: Tensor = torch.ones_like(weights)
            if rule is not None:
                margins, near = pair_margins(batch.ratings, batch.rated, better, worse, rule.below)
                factor, softened = rule.weights(near), rule.certainty(margins, near)
                weights = weights if factor is None else weights * factor
                certain = certain if softened is None else softened
            new, present = self._texts(train, indices)
            row = torch.full(present.shape, -1)
            row[present] = torch.arange(len(texts), len(texts) + len(new))
            texts += new
            values = (row[:, better], row[:, worse], indices[:, None].expand_as(pairs), weights, certain)
            for column, value in zip(columns, values, strict=True):
                column.append(value[pairs].numpy())
        return (texts, *(np.concatenate(column) for column in columns))

    def _texts(self, dataset: PreferenceDataset, indices: Tensor) -> tuple[list[str], Tensor]:
        """The responses that there are, in row-major order and without their prompts, and [n, K] where they are."""
        batch, own = dataset.batch(indices), dataset.response_tokens(indices)
        rows = zip(batch.tokens[batch.present], batch.lengths[batch.present], own[batch.present], strict=True)
        return [self._decode(tokens[int(end - length) : int(end)]) for tokens, end, length in rows], batch.present


def _fitted(difference: Any, weight: Any, certain: Any, strength: float) -> Any:
    """A model of both orders of each pair, so that neither class is the larger; each as sure as the pair is."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(fit_intercept=False, C=strength, max_iter=1000)
    num = len(weight)
    sure = np.concatenate([weight * certain, weight * certain, weight * (1 - certain), weight * (1 - certain)])
    labels = np.concatenate([np.ones(num), np.zeros(num), np.zeros(num), np.ones(num)])
    used = sure > 0
    rows = vstack([difference, -difference, difference, -difference]).tocsr()
    return model.fit(rows[used], labels[used], sample_weight=sure[used])
