"""How many samples an iteration consumes: the global batch size, constant or ramping up (spec a.8, e.1).

The global batch is cut over data-parallel ranks into micro-batches. Early in a large run a small batch learns as much
per sample-step, so `--rampup-batch-size START INCREMENT SAMPLES` begins with START and adds INCREMENT every SAMPLES /
steps samples until the full size is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from modellink.errors import ModelLinkError


@dataclass(frozen=True)
class BatchSizeSchedule:
    """Sizes in samples. `rampup` is (start, increment, samples of the ramp).

    Raises ModelLinkError when a batch size that will occur is not a multiple of micro-batch size * data-parallel size,
    or when the ramp does not lead from start to `global_batch_size` in whole increments.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    rampup: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for flag, value in (("global-batch-size", self.global_batch_size), ("micro-batch-size", self.micro_batch_size)):
            if value < 1:
                raise ModelLinkError(f"--{flag} {value} must be at least 1.")
        self._check_divisible("--global-batch-size", self.global_batch_size)
        if self.rampup is None:
            return
        start, increment, samples = self.rampup
        if start < 1 or increment < 1 or samples < 0 or start > self.global_batch_size:
            raise ModelLinkError(
                f"--rampup-batch-size {start} {increment} {samples} needs 1 <= start <= --global-batch-size "
                f"{self.global_batch_size}, increment >= 1 and samples >= 0."
            )
        if (self.global_batch_size - start) % increment:
            raise ModelLinkError(
                f"--rampup-batch-size: {self.global_batch_size} - {start} is not a multiple of the increment "
                f"{increment}; choose an increment that divides the difference of the full and the first batch size."
            )
        self._check_divisible("--rampup-batch-size start", start)
        if self._increments:
            self._check_divisible("--rampup-batch-size increment", increment)

    @property
    def quantum(self) -> int:
        """Samples of one micro-batch on every data-parallel rank; each batch size is a multiple of it."""
        return self.micro_batch_size * self.data_parallel_size

    @property
    def _increments(self) -> int:
        if self.rampup is None:
            return 0
        start, increment, _ = self.rampup
        return (self.global_batch_size - start) // increment

    def _check_divisible(self, what: str, value: int) -> None:
        if value % self.quantum:
            below = value // self.quantum * self.quantum
            nearest = " or ".join(str(size) for size in (below, below + self.quantum) if size)
            raise ModelLinkError(
                f"{what} {value} is not a multiple of micro-batch size {self.micro_batch_size} * data-parallel size "
                f"{self.data_parallel_size} = {self.quantum}; use {nearest}."
            )

    def at(self, consumed_samples: int) -> int:
        """The global batch size of the iteration that starts after `consumed_samples`."""
        if self.rampup is None or consumed_samples >= self.rampup[2]:
            return self.global_batch_size
        start, increment, samples = self.rampup
        return start + increment * (consumed_samples * self._increments // samples)

    def micro_batches(self, consumed_samples: int) -> int:
        """Micro-batches that each data-parallel rank runs in that iteration."""
        return self.at(consumed_samples) // self.quantum

    def samples_for(self, iterations: int) -> int:
        """Samples that the first `iterations` iterations consume."""
        consumed, done = 0, 0
        while done < iterations and self.at(consumed) < self.global_batch_size:
            consumed += self.at(consumed)
            done += 1
        return consumed + (iterations - done) * self.global_batch_size

    def iterations_for(self, samples: int) -> int:
        """Whole iterations that `samples` samples suffice for; a last partial batch is dropped."""
        consumed, done = 0, 0
        while self.at(consumed) < self.global_batch_size:
            if consumed + self.at(consumed) > samples:
                return done
            consumed += self.at(consumed)
            done += 1
        return done + (samples - consumed) // self.global_batch_size
