"""What networks answer to held-out prompts, in a run and at its end."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from abkd_jax import data as datasets
from abkd_jax import parallel
from abkd_jax.data import Tokenizer, read_tokenizer
from abkd_jax.generate import generate
from abkd_jax.metrics import text
from abkd_jax.models import base_of, decoder_in, merged
from abkd_jax.run.evaluation import batches_of
from abkd_jax.run.phases import Run
from abkd_jax.sources.written import prompts
from abkd_jax.train import Networks
from abkd_jax.types import Tokens

_KEY = 0x616E73  # folded into the key of data_seed


class Answers(NamedTuple):
    """Texts, of the first examples of a split.

    Attributes:
        prompts: N texts.
        references: what the data have after them, up to the first token that does not count.
        responses: {network: what it wrote after them}, at temperature 1.
    """

    prompts: list[str]
    references: list[str]
    responses: dict[str, list[str]]

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """The first ones: "prompts", "references", and "responses/NAME"."""
        own = {f"responses/{name}": texts for name, texts in self.responses.items()}
        found = {"prompts": self.prompts, "references": self.references} | own
        return {name: np.asarray(texts[:count], str) for name, texts in found.items()}

    def scores(self) -> dict[str, dict[str, float]]:
        """{network: {"rouge_l": the mean over prompts}}."""
        references = [[reference] for reference in self.references]
        return {
            name: {"rouge_l": float(np.mean(text.rouge_l(own, references)))}
            for name, own in self.responses.items()
        }


def with_answers(
    summary: Mapping[str, Any],
    run: Run,
    networks: Networks,
    split: datasets.Split | datasets.Stream,
) -> tuple[Mapping[str, Any], Answers | None]:
    """A summary of a split with "rouge_l" of each network in it, and the answers; or as it is."""
    if not run.plan.task.responses:
        return summary, None
    found = answers(run, networks, split, summary)
    scores = found.scores()
    return {name: values | scores[name] for name, values in summary.items()}, found


def answers(
    run: Run, networks: Networks, split: datasets.Split | datasets.Stream, names: Iterable[str]
) -> Answers:
    """What some networks write after the prompts of `run.plan.task.responses` examples.

    Args:
        run: whose data these are.
        networks: with the parameters of their evaluation.
        split: of text, a text in each row.
        names: of the decoders that answer.

    Returns:
        The texts; the same for the same parameters.
    """
    tokenizer = read_tokenizer(run.plan.config["data"].get("tokenizer", "bytes"))
    count, size = run.plan.task.responses, run.plan.config["batch_size"]
    found = Answers([], [], {name: [] for name in names})
    key = jax.random.fold_in(jax.random.key(run.plan.config["data_seed"]), _KEY)
    for index, batch in enumerate(batches_of(split, size, run.mesh)):
        if len(found.prompts) >= count:
            break
        length = batch["inputs"].ids.shape[-1]
        given, whole = prompts(batch, length // 2), prompts(batch, length)
        where = parallel.fetched(batch["where"])
        rows = np.flatnonzero(np.any(where, axis=1))[: count - len(found.prompts)]
        sizes = np.sum(parallel.fetched(whole.segments) > 0, axis=1)
        data = _there(batch["inputs"])
        for row in rows:
            own, size = data[row], sizes[row]
            counts = where[row, size - 1 : len(own) - 1]  # those of the tokens after the prompt
            end = size + int(np.argmin(np.append(counts, False)))
            found.prompts.append(tokenizer.decode(own[:size].tolist()))
            found.references.append(_text(tokenizer, own[size:end]))
        for name, own in found.responses.items():
            new = _written(run, name, networks[name], given, jax.random.fold_in(key, index))
            own += [_text(tokenizer, new[row]) for row in rows]
    return found


def _written(run: Run, name: str, state: Any, given: Any, key: Any) -> list[np.ndarray]:
    """The ids that a network writes after each prompt."""
    module = run.plan.networks[name].module
    params = merged(module, state.whole(state.eval_params))
    how = {"key": key, "max_new_tokens": given.ids.shape[-1], "stop": (run.data.eos,)}
    written, _ = generate(decoder_in(base_of(module)), {"params": params}, given, **how)
    return _there(written, given.ids.shape[-1])


def _there(tokens: Tokens, start: int = 0) -> list[np.ndarray]:
    """The ids of each row that are no padding, from a place on."""
    tokens = parallel.fetched(tokens)
    pairs = zip(tokens.ids, tokens.segments > 0, strict=True)
    return [ids[start:][there[start:]] for ids, there in pairs]


def _text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of ids, without the end."""
    return tokenizer.decode(ids[ids != tokenizer.eos].tolist())
