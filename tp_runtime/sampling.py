"""The next token, from logits that are cut over the vocabulary: the same one on every rank.

    greedy     argmax on each shard, then of the shards' maxima: 2 numbers a sequence and rank travel
    top-k      the k largest of each shard: 2k numbers
    otherwise  all logits

Rank 0 draws among the candidates and tells the others, so that no difference between machines can part them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch.overrides import TorchFunctionMode

from .comm import Communicator
from .kernels.lost import raise_lost
from .kernels.vocab_top_k import vocab_top_k
from .local import LocalCommunicator

_DRAWS = frozenset(
    {torch.multinomial, torch.Tensor.multinomial, torch.rand, torch.rand_like, torch.randint, torch.bernoulli}
)


class _DrawOnRankZero(TorchFunctionMode):
    """Every draw of this thread is rank 0's: threads of one process share torch's generators, which cannot be in step.

    The other ranks draw from generators of their own, so that rank 0's draws are those of a program of one rank.
    """

    def __init__(self, comm: Communicator):
        super().__init__()
        self.comm = comm

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _DRAWS:
            return func(*args, **kwargs)
        if self.comm.rank and kwargs.get("generator") is None:
            device = args[0].device if isinstance(args[0], torch.Tensor) else kwargs.get("device") or "cpu"
            kwargs = {**kwargs, "generator": torch.Generator(device)}
        return self.comm.broadcast(func(*args, **kwargs))


@contextlib.contextmanager
def draw_in_step(comm: Communicator) -> Iterator[None]:
    """Within it, torch's default generators give every rank rank 0's numbers, as long as all ranks draw alike."""
    if isinstance(comm, LocalCommunicator):
        with _DrawOnRankZero(comm):
            yield
        return
    torch.set_rng_state(comm.broadcast(torch.get_rng_state().to(comm.device)).cpu())
    if comm.device.type == "cuda":
        state = torch.cuda.get_rng_state(comm.device).to(comm.device)
        torch.cuda.set_rng_state(comm.broadcast(state).cpu(), comm.device)
    yield


class Sampler:
    """Chooses the next token of each sequence from this rank's part of the logits.

    Of equal logits that of the lower token id counts as the larger: ties are settled alike at every tp_size, and top_k
    keeps k tokens where Hugging Face keeps all that equal the k-th.

    Args:
        comm: the ranks; they make the same calls.
        lengths: vocabulary entries of each rank.
        temperature, top_k, top_p: as in Hugging Face's generate(), applied in this order; temperature 0 is greedy.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before; 1 changes nothing.
        seed: of the draws, which rank 0 makes; None for a new one.
    """

    def __init__(
        self,
        comm: Communicator,
        lengths: Sequence[int],
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ):
        self.comm, self.lengths = comm, list(lengths)
        self.start = sum(self.lengths[: comm.rank])
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.repetition_penalty = repetition_penalty
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def next_tokens(self, logits_shard_v: torch.Tensor, seen: torch.Tensor | None = None) -> list[int]:
        """The next token of each sequence.

        Args:
            logits_shard_v: [B, V_r].
            seen: [B, S] token ids that the repetition penalty applies to; -1 where there is none.

        Returns:
            B token ids, the same on every rank.

        Raises:
            ValueError: a token of this step was given an expert that does not exist, or a position past the cache.
            FloatingPointError: on every rank, where a sequence's logits hold a NaN or their largest is infinite.
        """
        logits = logits_shard_v
        if self.repetition_penalty != 1 and seen is not None:
            logits = self._penalise(logits.float(), seen)
        if self.temperature == 0:
            return self._candidates(logits, 1)[1][:, 0].tolist()
        values, ids = self._candidates(logits, self.top_k or sum(self.lengths))
        tokens = torch.empty(len(ids), dtype=torch.int64)
        if self.comm.rank == 0:
            cumulative = self._probabilities(values).cumsum(-1)
            point = torch.rand(len(ids), 1, generator=self._generator, dtype=torch.float64) * cumulative[:, -1:]
            tokens = ids.gather(1, torch.searchsorted(cumulative, point, right=True)).squeeze(1)
        return self.comm.broadcast(tokens.to(self.comm.device)).tolist()

    def _probabilities(self, values: torch.Tensor) -> torch.Tensor:
        """Weights of the draw for logits [B, k], largest first; 0 behind the token that reaches top_p."""
        probabilities = torch.softmax(values.double() / self.temperature, dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        return probabilities * (before < self.top_p) if self.top_p < 1 else probabilities

    def _candidates(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest logits of the whole vocabulary and their ids, largest first, [B, k] each, on the CPU."""
        counts = [min(k, n) for n in self.lengths]
        values, ids = _largest(logits, counts[self.comm.rank], self.start)
        # Ids travel as float32, exact below 2^24, so that one gather serves both.
        pairs = torch.cat((values, ids.float()), dim=-1)
        whole = self.comm.all_gather(pairs, [2 * n for n in counts]).cpu()
        raise_lost(logits.device)  # the device has finished the step
        parts = whole.split([n for count in counts for n in (count, count)], dim=-1)
        values, ids = torch.cat(parts[::2], -1), torch.cat(parts[1::2], -1).long()
        order = values.argsort(dim=-1, descending=True, stable=True)[:, :k]
        values, ids = values.gather(1, order), ids.gather(1, order)
        for index, largest in enumerate(values[:, 0].tolist()):
            if not math.isfinite(largest):
                raise FloatingPointError(
                    f"{'NaN' if math.isnan(largest) else largest} in the logits of sequence {index}: "
                    "the model's weights or activations are not finite; check the checkpoint, or choose dtype float32"
                )
        return values, ids

    def _penalise(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        local = seen - self.start
        inside = (local >= 0) & (local < logits.shape[-1])
        padded = torch.cat((logits, logits.new_zeros(len(logits), 1)), dim=-1)  # a place for ids of other ranks
        local = torch.where(inside, local, logits.shape[-1])
        scores = padded.gather(1, local)
        scores = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
        return padded.scatter(1, local, scores)[:, :-1]


def _largest(logits: torch.Tensor, k: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, [B, k], and their ids, of equal ones in order; a row that holds a NaN gives a NaN."""
    if k == logits.shape[-1]:
        return logits.float(), torch.arange(start, start + k, device=logits.device).expand(logits.shape)
    return vocab_top_k(logits, k, start)
