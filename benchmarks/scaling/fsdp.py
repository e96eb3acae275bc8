"""The collectives of FSDP2 in one step, by playing the step through: which group of parameters is whole when.

A group (`MoCo.units`: a stage of a ResNet, a block of a ViT, a head) is gathered when its forward or backward pass begins
and it is cut, and cut again after its backward pass; on stage 3 after its forward pass, too. When a group's backward pass
begins, FSDP2 gathers the one that ran forward before it, so that it is there in time: in the order of all forward passes, the
momentum encoder's included, so now and then it is one that nobody needs. Gradients are scattered as a group's
backward pass ends. On stage 0 nothing is cut and gradients are all-reduced.
"""

from collections.abc import Iterator

from torch import nn

from crossbatch.engine.config import ResolvedConfig
from crossbatch.models import MoCo

_FP32 = 4
_CUT, _COMING, _WHOLE = range(3)
_Found = tuple[str, str, int]


def fsdp_messages(model: MoCo, run: ResolvedConfig) -> Iterator[_Found]:
    """(part, kind, bytes) of every call."""
    play = _Play(model, run)
    backbone, keys = model.online.backbone, model.momentum.batchformer or model.batchformer
    for _ in range(run.chunks):
        play.forward(backbone)
        play.forward(model.momentum.backbone)
    queries = [part for part in (model.batchformer, model.online.projector, model.predictor) if part is not None]
    for part in (*queries, keys, model.momentum.projector):
        if part is not None:
            play.forward(part)
    for part in reversed(queries):
        play.backward(part, send=True)
    if run.chunks > 1:
        play.finish(last=False)
    play.backward(backbone, send=run.chunks == 1)
    play.finish(last=run.chunks == 1)
    for chunk in range(1, run.chunks):
        play.forward(backbone)
        play.backward(backbone, send=chunk == run.chunks - 1)
        play.finish(last=chunk == run.chunks - 1)
    yield from play.messages
    if play.stage > 0:
        yield "gradient norm", "all-reduce", _FP32


class _Play:
    def __init__(self, model: MoCo, run: ResolvedConfig):
        self.stage, self._ranks = run.config.zero_optimization.stage, run.world_size
        self.messages: list[_Found] = []
        owned: set[nn.Parameter] = set()
        self._parameters: dict[nn.Module, list[nn.Parameter]] = {}
        for module in model.fsdp_units():  # from the inside out
            self._parameters[module] = [p for p in module.parameters() if p not in owned]
            owned.update(self._parameters[module])
        self._state = dict.fromkeys(self._parameters, _CUT if self.stage else _WHOLE)
        self._order: list[nn.Module] = []  # of the ends of forward passes
        self._ends: dict[nn.Module, list[int]] = {module: [] for module in self._parameters}

    def forward(self, module: nn.Module) -> None:
        """With the groups inside of it."""
        self._gather(module)
        self._state[module] = _WHOLE
        for inner in self._inside(module):
            self.forward(inner)
        if self.stage == 3:
            self._state[module] = _CUT
        self._ends[module].append(len(self._order))
        self._order.append(module)

    def backward(self, module: nn.Module, send: bool) -> None:
        self._gather(module)
        self._state[module] = _WHOLE
        if self._ends[module] and (end := self._ends[module].pop()) > 0:
            self._gather(self._order[end - 1])
        for inner in reversed(self._inside(module)):
            self.backward(inner, send)
        if self.stage:
            self._state[module] = _CUT
        trained = [p for p in self._parameters[module] if p.requires_grad]
        if send and trained:
            self.messages.append(("gradients", "reduce-scatter" if self.stage else "all-reduce", self._bytes(trained)))

    def finish(self, last: bool) -> None:
        """The end of a call of `backward`. What was gathered for nobody is let go at the last one only."""
        for module, state in self._state.items():
            if (state == _WHOLE and self.stage) or (state == _COMING and last):
                self._state[module] = _CUT
        if last:
            self._order.clear()
            self._ends = {module: [] for module in self._ends}

    def _gather(self, module: nn.Module) -> None:
        if self._state[module] == _CUT and self._parameters[module]:
            self._state[module] = _COMING
            self.messages.append(("parameters", "all-gather", self._bytes(self._parameters[module])))

    def _bytes(self, parameters: list[nn.Parameter]) -> int:
        """Rows are cut in runs of ceil(rows / ranks)."""
        if not self.stage:
            return _FP32 * sum(p.numel() for p in parameters)
        return _FP32 * sum(-(-p.shape[0] // self._ranks) * self._ranks * p[0].numel() for p in parameters)

    def _inside(self, module: nn.Module) -> list[nn.Module]:
        """Groups directly inside, in the order of the forward pass."""
        return [inner for inner in module.modules() if inner is not module and inner in self._parameters]


def largest_groups(model: MoCo, count: int) -> float:
    """Elements of the `count` largest groups: what is whole at once, at most."""
    owned: set[nn.Parameter] = set()
    sizes = []
    for module in model.fsdp_units():
        own = [p for p in module.parameters() if p not in owned]
        owned.update(own)
        sizes.append(sum(p.numel() for p in own))
    return float(sum(sorted(sizes)[-count:]))
