"""One optimizer for float32, bfloat16 and float16 weights, plain or sharded; the update itself is a strategy.

The optimizer owns where numbers live: which weights have float32 masters and in which form, how gradients are scaled
and converted, how state is named, packed and wrapped. An `UpdateRule` (AdamW, SGD, cadam, Muon) owns the arithmetic,
and sees only lists of plain float32 tensors. Work goes bucket by bucket: a bucket is a list of flat pieces of local
shards with at most `bucket_elements` elements in all, so temporaries (a reconstructed master, a float32 gradient, an
unpacked state) are bounded however large the model or one embedding is; rules that need whole shards exceed it. All
master modes use the same pieces and so give the same bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Required, TypedDict

import torch
from torch import Tensor, nn

from modellink.errors import ModelLinkError
from modellink.optim.host import Arrival, Beside, HostLink, Link
from modellink.optim.local import gradient_of, like_parameter, local_tensor, main_gradient_of, shard_count
from modellink.optim.rounding import merge_float32, split_float32_
from modellink.optim.states import State, StateForm, master_dtype

# On a device fewer buckets mean fewer launches. On CPU the allocator returns larger temporaries to the system at once,
# and faulting their pages in again at every step costs three times the step itself.
_CPU_BUCKET = 1 << 22
_DEVICE_BUCKET = 1 << 24

MasterMode = Literal["none", "separate", "split"]


class UpdateRule(Protocol):
    """The arithmetic of one step.

    `states` are the per-parameter states it keeps, zero before the first step, and how they lie in memory. A rule that
    needs a shard in one piece, empty ones too, because it communicates about them, says `whole_shards`.
    """

    states: Mapping[str, StateForm]
    whole_shards: bool

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        params: list[Tensor],
        *,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update `weights` and `states` (one list per state name) in place; `step` counts from 1.

        All are flat pieces; `params` are the parameters they belong to, for shapes and placements only.
        """


@dataclass(frozen=True)
class _Piece:
    """Elements [start, stop) of the flattened local shard of one parameter."""

    name: str
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return local_tensor(tensor).contiguous().view(-1)[self.start : self.stop]


@dataclass
class _Bucket:
    rule: UpdateRule
    group: int
    mode: MasterMode
    pieces: list[_Piece] = field(default_factory=list)
    numel: int = 0


class _Work(NamedTuple):
    """The pieces of a bucket that have gradients, with these and the weights on their way to the update."""

    bucket: _Bucket
    pieces: list[_Piece]
    gradients: Arrival
    weights: Arrival


def is_bias_or_vector(name: str, param: Tensor) -> bool:
    """Megatron's rule for what is not decayed: biases and 1-dimensional parameters (spec e.2)."""
    return param.ndim <= 1 or name.endswith("bias")  # experts stack theirs: up_proj_bias [E, F]


class OptimizerOptions(TypedDict, total=False):
    """What every optimizer takes besides its parameters, its rule and its weight decay; see MixedPrecisionOptimizer."""

    lr: Required[float]
    master: MasterMode
    no_decay: Callable[[str, Tensor], bool]
    decoupled: Callable[[str], bool] | None
    bucket_elements: int | None
    on_host: bool


class MixedPrecisionOptimizer:
    """Steps named parameters with an `UpdateRule` in float32.

    float32 (and float64) parameters are their own masters. bfloat16 and float16 parameters keep float32 masters:
    `master="separate"` as tensors of their own, `master="split"` (bfloat16 only) as the weight plus an int16 remainder;
    the two are bit-identical (modellink/optim/rounding.py). Parameters that do not require gradients are left out, and
    one without a gradient at a step is left alone. `param_groups` has keys `names`, `lr`, `weight_decay`,
    `weight_decay_multiplier` (0 for names that `no_decay` selects) and `decoupled_lr` (true for names that `decoupled`
    selects); schedules set `lr` and `weight_decay`. `rule_for` may give some parameters another rule than `rule`.
    `on_host` keeps masters and states in host memory and updates there (modellink/optim/host.py).

    Raises ModelLinkError when a parameter's dtype does not fit `master`, or a shard is not contiguous.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        rule: UpdateRule,
        *,
        lr: float,
        weight_decay: float = 0.0,
        master: MasterMode = "separate",
        no_decay: Callable[[str, Tensor], bool] = is_bias_or_vector,
        decoupled: Callable[[str], bool] | None = None,
        bucket_elements: int | None = None,
        rule_for: Callable[[str, Tensor], UpdateRule] | None = None,
        on_host: bool = False,
    ) -> None:
        self.step_count = 0
        self.link: Link = HostLink() if on_host else Beside()
        self._params: dict[str, nn.Parameter] = {}
        for name, param in named_params:
            if name in self._params:
                raise ModelLinkError(f"optimizer: two parameters are named {name!r}; give each its own name.")
            if param.requires_grad:
                self._params[name] = param
        self._modes = {name: _mode_of(name, param, master) for name, param in self._params.items()}
        self.param_groups = self._make_groups(lr, weight_decay, no_decay, decoupled)
        self._rules = {name: rule_for(name, p) if rule_for is not None else rule for name, p in self._params.items()}
        self._states: dict[str, dict[str, State]] = {
            name: {key: form(self.link.like(param)) for key, form in self._rules[name].states.items()}
            for name, param in self._params.items()
        }
        self._buckets = self._make_buckets(bucket_elements)
        self._masters = self._zeros("separate")
        self._remainders = self._zeros("split")
        self.reload_masters_from_params()

    def _make_groups(
        self,
        lr: float,
        weight_decay: float,
        no_decay: Callable[[str, Tensor], bool],
        decoupled: Callable[[str], bool] | None,
    ) -> list[dict[str, Any]]:
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, param in self._params.items():
            multiplier = 0.0 if no_decay(name, param) else 1.0
            apart = decoupled is not None and decoupled(name)
            group = groups.setdefault(
                (multiplier, apart),
                {
                    "names": [],
                    "lr": lr,
                    "weight_decay": weight_decay * multiplier,
                    "weight_decay_multiplier": multiplier,
                    "decoupled_lr": apart,
                },
            )
            group["names"].append(name)
        return list(groups.values())

    def _make_buckets(self, bucket_elements: int | None) -> list[_Bucket]:
        buckets: list[_Bucket] = []
        filling: dict[tuple[Any, ...], _Bucket] = {}
        for index, group in enumerate(self.param_groups):
            for name in group["names"]:
                shard, mode, rule = local_tensor(self._params[name]), self._modes[name], self._rules[name]
                key = (index, mode, shard.dtype, shard.device, id(rule))
                home = local_tensor(self.link.like(self._params[name])).device
                limit = bucket_elements or (_CPU_BUCKET if home.type == "cpu" else _DEVICE_BUCKET)
                for piece in self._pieces(name, limit):
                    size, least = piece.stop - piece.start, 0
                    if rule.whole_shards:
                        # alike on all ranks that share the parameters, and with work for each of them
                        ranks = shard_count(self._params[name])
                        size, least = -(-self._params[name].numel() // ranks), 2 * ranks
                    bucket = filling.get(key)
                    if bucket is None or (bucket.numel + size > limit and len(bucket.pieces) >= least):
                        bucket = filling[key] = _Bucket(rule, index, mode)
                        buckets.append(bucket)
                    bucket.pieces.append(piece)
                    bucket.numel += size
        return buckets

    def _pieces(self, name: str, limit: int) -> list[_Piece]:
        """The shard of one parameter in pieces of at most `limit` elements, or a unit of its states if that is more."""
        numel = local_tensor(self._params[name]).numel()
        if self._rules[name].whole_shards:
            return [_Piece(name, 0, numel)]
        unit = math.lcm(*(state.unit for state in self._states[name].values()))
        size = max(limit // unit * unit, unit)
        return [_Piece(name, start, min(start + size, numel)) for start in range(0, numel, size)]

    def _zeros(self, mode: MasterMode) -> dict[str, Tensor]:
        """A zero tensor beside every parameter of `mode`, as wide as `mode` needs it."""
        state = {}
        for name, param in self._params.items():
            if mode == self._modes[name]:
                shard = local_tensor(self.link.like(param))
                dtype = torch.int16 if mode == "split" else master_dtype(shard)
                state[name] = like_parameter(param, torch.zeros(shard.shape, dtype=dtype, device=shard.device))
        return state

    @torch.no_grad()
    def step(self, grad_scale: Tensor | float = 1.0) -> None:
        """Update every parameter that has a gradient, from `gradient * grad_scale`.

        `grad_scale` is the product of the inverse loss scale and the clip coefficient, a float or a 0-dimensional
        tensor on the gradients' device (no synchronisation). Gradients of the master's own dtype are scaled in place,
        as clipping does; others are converted bucket by bucket. `main_grad` is preferred over `grad`.
        """
        self.step_count += 1
        if isinstance(grad_scale, Tensor):
            (grad_scale,) = self.link.fetch([grad_scale])()
        for bucket, pieces, gradients, weights in self._arriving():
            flat, masters = self._read_masters(bucket.mode, pieces, weights)
            group = self.param_groups[bucket.group]
            kept = [[(self._states[p.name][key], p.start, p.stop) for p in pieces] for key in bucket.rule.states]
            states = [[state.read(start, stop) for state, start, stop in row] for row in kept]
            bucket.rule(
                masters,
                _scaled(gradients(), masters[0].dtype, grad_scale),
                states,
                [self._params[piece.name] for piece in pieces],
                step=self.step_count,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
            )
            for row, values in zip(kept, states, strict=True):
                for (state, start, stop), value in zip(row, values, strict=True):
                    state.write(start, stop, value)
            self._write_weights(bucket.mode, pieces, flat, masters)
        self.link.finish()

    def _arriving(self) -> Iterator[_Work]:
        """What there is to update, each bucket once the ones that travel ahead of it have set out."""
        travelling: deque[_Work] = deque()
        for bucket in self._buckets:
            pairs = [(piece, gradient_of(self._params[piece.name])) for piece in bucket.pieces]
            pieces = [piece for piece, gradient in pairs if gradient is not None]
            if not pieces:
                continue
            gradients = self.link.fetch([piece.of(gradient) for piece, gradient in pairs if gradient is not None])
            travelling.append(_Work(bucket, pieces, gradients, self._fetch_weights(bucket.mode, pieces)))
            if len(travelling) > self.link.ahead:
                yield travelling.popleft()
        yield from travelling

    def _fetch_weights(self, mode: MasterMode, pieces: list[_Piece]) -> Arrival:
        """Weights that are masters or halves of them; separate masters are where the update is."""
        if mode == "separate":
            return lambda: []
        return self.link.fetch(self._weights(pieces))

    def _weights(self, pieces: list[_Piece]) -> list[Tensor]:
        return [piece.of(self._params[piece.name]) for piece in pieces]

    def _read_masters(
        self, mode: MasterMode, pieces: list[_Piece], weights: Arrival
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The master pieces; with the split form also the temporary flat tensor that they are views of."""
        if mode == "separate":
            return None, [piece.of(self._masters[piece.name]) for piece in pieces]
        if mode == "none":
            return None, weights()
        flat = merge_float32(
            torch.cat(weights()),
            torch.cat([piece.of(self._remainders[piece.name]) for piece in pieces]),
        )
        return flat, list(flat.split([piece.stop - piece.start for piece in pieces]))

    def _write_weights(
        self, mode: MasterMode, pieces: list[_Piece], flat: Tensor | None, masters: list[Tensor]
    ) -> None:
        """Round updated masters into the low-precision weights (and remainders)."""
        if mode == "none" and not self.link.ahead:
            return
        weights = self._weights(pieces)
        if weights[0].dtype != torch.bfloat16:
            self.link.send(weights, masters)
            return
        weight, remainder = split_float32_(torch.cat(masters) if flat is None else flat)
        sizes = [piece.numel() for piece in weights]
        self.link.send(weights, list(weight.split(sizes)))
        if mode == "split":
            remainders = [piece.of(self._remainders[piece.name]) for piece in pieces]
            torch._foreach_copy_(remainders, list(remainder.split(sizes)))

    def zero_grad(self) -> None:
        """Drop gradients, `main_grad` buffers too: the next step's may be partial sums of another placement."""
        for param in self._params.values():
            param.grad = None
            if main_gradient_of(param) is not None:
                param.main_grad = None  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Tensor | int]:
        """Flat: "exp_avg.NAME" and so on (float32, placed as the parameter is), and "step".

        Tensors are the live ones, or copies of states that are kept packed.
        """
        flat: dict[str, Tensor | int] = {"step": self.step_count}
        for key, name, state in self._all_states():
            flat[f"{key}.{name}"] = state.whole()
        return flat

    def _all_states(self) -> list[tuple[str, str, State]]:
        """(state name, parameter name, state)"""
        return [(key, name, state) for name, states in self._states.items() for key, state in states.items()]

    @torch.no_grad()
    def load_state_dict(self, flat: Mapping[str, Tensor | int]) -> None:
        """Copy a state in the form of `state_dict`; raises ModelLinkError on missing, unknown or misshapen entries."""
        own = {f"{key}.{name}": (name, state) for key, name, state in self._all_states()}
        _check_names("optimizer state", ["step", *own], flat)
        self.step_count = int(flat["step"])
        for key, (name, state) in own.items():
            value = flat[key]
            _check_shape(key, self._params[name], value)
            assert isinstance(value, Tensor)
            shard = local_tensor(value).contiguous().view(-1)
            state.write(0, shard.numel(), shard)

    @torch.no_grad()
    def master_state(self) -> dict[str, Tensor]:
        """float32 masters by parameter name: live ones, or (split form) a copy that is reconstructed by this call."""
        masters: dict[str, Tensor] = {}
        for name, param in self._params.items():
            if self._modes[name] == "split":
                shard = local_tensor(param)
                remainder = local_tensor(self._remainders[name]).view(-1)
                flat = merge_float32(shard.view(-1).to(remainder.device), remainder)
                masters[name] = like_parameter(param, flat.view(shard.shape))
            else:
                masters[name] = self._masters[name] if name in self._masters else param.detach()
        return masters

    @torch.no_grad()
    def load_master_state(self, masters: Mapping[str, Tensor]) -> None:
        """Take over masters in the form of `master_state` and round the low-precision weights from them."""
        _check_names("master weights", self._params, masters)
        for name, param in self._params.items():
            value = masters[name]
            if self._modes[name] == "none":
                _copy(name, param, value)
            elif self._modes[name] == "separate":
                _copy(name, self._masters[name], value)
        for bucket in self._buckets:
            if bucket.mode == "separate":
                pieces = [piece.of(self._masters[piece.name]) for piece in bucket.pieces]
                self._write_weights(bucket.mode, bucket.pieces, None, pieces)
            elif bucket.mode == "split":
                for piece in bucket.pieces:
                    _check_shape(piece.name, self._params[piece.name], masters[piece.name])
                pieces = [piece.of(masters[piece.name]) for piece in bucket.pieces]
                self._write_weights(bucket.mode, bucket.pieces, torch.cat(pieces).float(), [])
        self.link.finish()

    @torch.no_grad()
    def reload_masters_from_params(self) -> None:
        """Make every master equal to its low-precision weight, for when weights were loaded without masters."""
        for name, master in self._masters.items():
            local_tensor(master).copy_(local_tensor(self._params[name]))
        for remainder in self._remainders.values():
            local_tensor(remainder).zero_()

    def state_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the optimizer itself holds in memory: (masters or remainders, states)."""
        states = [tensor for _, _, state in self._all_states() for tensor in state.tensors()]
        return [*self._masters.values(), *self._remainders.values()], states

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """What lives from step to step: weights, gradients (where there are any now), masters, moments."""
        masters, states = self.state_tensors()
        params: list[Tensor] = list(self._params.values())
        gradients = [grad for param in params for grad in (param.grad, main_gradient_of(param))]
        return {
            "weights": params,
            "gradients": [grad for grad in gradients if grad is not None],
            "masters": masters,
            "moments": states,
        }

    def bytes_per_parameter(self) -> dict[str, float]:
        """Measured bytes per local parameter, from storage sizes: weights, gradients, masters, moments."""
        count = max(1, sum(local_tensor(param).numel() for param in self._params.values()))
        return {what: _storage_bytes(items) / count for what, items in self.held_tensors().items()}

    def state_bytes_per_parameter(self) -> float:
        """Measured bytes per local parameter that the optimizer itself holds: masters (or remainders) and moments."""
        measured = self.bytes_per_parameter()
        return measured["masters"] + measured["moments"]


def _scaled(grads: list[Tensor], dtype: torch.dtype, scale: Tensor | float) -> list[Tensor]:
    """The gradients in `dtype` times `scale`; changed in place where the dtype is right."""
    unscaled = not isinstance(scale, Tensor) and scale == 1.0
    if all(grad.dtype == dtype for grad in grads):
        if not unscaled:
            torch._foreach_mul_(grads, scale)
        return grads
    flat = torch.cat(grads).to(dtype)
    if not unscaled:
        flat.mul_(scale)
    return list(flat.split([grad.numel() for grad in grads]))


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {s.data_ptr(): s.nbytes() for s in (local_tensor(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


def _mode_of(name: str, param: Tensor, master: MasterMode) -> MasterMode:
    """How the master of `param` is kept; every complaint about a parameter is made here."""
    if not local_tensor(param).is_contiguous():
        raise ModelLinkError(f"optimizer: parameter {name!r} is not contiguous; call .contiguous() on it first.")
    if param.dtype in (torch.float32, torch.float64):
        return "none"
    if param.dtype not in (torch.bfloat16, torch.float16):
        raise ModelLinkError(
            f"optimizer: parameter {name!r} has dtype {param.dtype}; use float32, bfloat16 or float16 weights."
        )
    if master == "none":
        raise ModelLinkError(
            f"optimizer: parameter {name!r} is {param.dtype} and needs a float32 master; "
            "use master='separate' or 'split'."
        )
    if master == "split" and param.dtype != torch.bfloat16:
        raise ModelLinkError(
            f"optimizer: master='split' (--reuse-fp32-param) needs bfloat16 weights but parameter {name!r} is "
            f"{param.dtype}; use --bf16 or drop --reuse-fp32-param."
        )
    return master


def _check_names(what: str, own: Iterable[str], given: Iterable[str]) -> None:
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unknown:
        raise ModelLinkError(
            f"{what}: {len(missing)} entries are missing (first: {missing[:1]}) and {len(unknown)} unknown "
            f"(first: {unknown[:1]}); load a checkpoint of the same model and optimizer."
        )


def _check_shape(name: str, target: Tensor, value: Tensor | int) -> None:
    if not isinstance(value, Tensor) or local_tensor(value).shape != local_tensor(target).shape:
        shape = tuple(local_tensor(value).shape) if isinstance(value, Tensor) else value
        raise ModelLinkError(
            f"optimizer state {name!r}: the local shard is {shape} but {tuple(local_tensor(target).shape)} is needed; "
            "load it through the distributed checkpoint, which reshards."
        )


def _copy(name: str, target: Tensor, value: Tensor | int) -> None:
    _check_shape(name, target, value)
    assert isinstance(value, Tensor)
    local_tensor(target).copy_(local_tensor(value))
