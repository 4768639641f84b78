"""Find the parts of a language model by what they do in one tiny forward pass, not by their names.

Knows PyTorch modules and nothing of tokenizers, prompts or methods. A model whose structure is not
understood is refused: a hook in the wrong place looks like a method that does not work.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from innsteer.errors import InputError, LayoutError
from innsteer.site import Site

PROBE_TOKENS = 5
# Parameter names by which an attention module's forward can be told from an MLP's or a norm's.
ATTENTION_ARGUMENTS = {"attention_mask", "past_key_values", "past_key_value", "layer_past"}


@dataclass(frozen=True)
class Block:
    """One decoder block and its parts; a norm is None where nothing normalises that part's input.

    ``attention_out`` is the linear map whose input holds the concatenated heads and whose output is
    what attention adds to the residual stream (Gemma 2 and OLMo 2 normalise it and the MLP's output
    once more before they add it). One module may be both norms (GPT-J, Phi).
    """

    module: nn.Module
    attention: nn.Module
    attention_out: nn.Module
    mlp: nn.Module
    attention_norm: nn.Module | None
    mlp_norm: nn.Module | None


@dataclass(frozen=True)
class Layout:
    """The decoder blocks of a model, in order, and the widths of their streams."""

    blocks: tuple[Block, ...]
    width: int
    """d, the width of the residual stream."""
    heads_width: int
    """Number of heads times the width of one; equals d in many models, not in all."""

    def at(self, site: Site) -> tuple[nn.Module, Literal["input", "output"]]:
        """The module to hook for a site, and which of its two sides is the stream.

        Raises:
            InputError: no such layer, or the block has no such part; the message says which it has.
        """
        if site.layer >= len(self.blocks):
            raise InputError(
                f"layer {site.layer} of a model with {len(self.blocks)} blocks",
                expected=f"a layer from 0 to {len(self.blocks) - 1}",
            )
        block = self.blocks[site.layer]
        places: dict[str, tuple[nn.Module | None, Literal["input", "output"]]] = {
            "residual": (block.module, "output"),
            "attention": (block.attention_out, "output"),
            "heads": (block.attention_out, "input"),
            "mlp": (block.mlp, "output"),
            "attention_norm": (block.attention_norm, "output"),
            "mlp_norm": (block.mlp_norm, "output"),
        }
        module, side = places[site.stream]
        if module is None:
            found = ", ".join(name for name, (part, _) in places.items() if part is not None)
            raise InputError(
                f"layer {site.layer} has no stream {site.stream!r}", expected=f"one of {found}"
            )
        return module, side

    def width_of(self, site: Site) -> int:
        """Width of a site's rows."""
        return self.heads_width if site.stream == "heads" else self.width


@dataclass(frozen=True)
class _Call:
    """What one module was given and gave in the probe pass; ``order`` counts finished calls."""

    order: int
    given: Tensor | None
    gave: Tensor | None
    streams: int
    """Number of different tensors [1, tokens, width] among its arguments."""


def find_layout(model: nn.Module) -> Layout:
    """Find blocks, attention, MLPs and norms by one forward pass of five tokens under hooks.

    The blocks are the ``ModuleList`` of modules of one class, as long as the config's number of
    layers (or the longest one), that are called in order and each take and return a tensor
    [1, tokens, d]. In a block, attention is the child whose ``forward`` takes an attention mask or
    a cache, its output map the last linear that runs in it (their outputs are compared), the MLP
    the other child with two or more matrices, and a norm the child whose output is what attention
    or the MLP gets. The model's weights, mode and random state stay as they are.

    Raises:
        LayoutError: some part was not found; the message says what was looked for and what is
            there.
    """
    lists = _block_lists(model)
    calls = _probe(model, [block for _, blocks in lists for block in blocks])
    problems = []
    for name, blocks in lists:
        try:
            return _layout(list(blocks), calls)
        except LayoutError as error:
            problems.append(f"{name}: {error}")
    raise LayoutError(
        f"{type(model).__name__}: no decoder blocks found; " + " | ".join(problems),
        remedy="a model of this kind needs a rule in innsteer/models/layout.py",
    )


def _block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists that could hold the blocks: those of the config's length, else the longest."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    uniform = [(name, part) for name, part in lists.items() if len({type(m) for m in part}) == 1]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    exact = [(name, part) for name, part in uniform if len(part) == layers]
    if uniform:
        longest = max(len(part) for _, part in uniform)
        return exact or [(name, part) for name, part in uniform if len(part) == longest]
    found = [
        f"{name} ({len(part)} of {', '.join(sorted({type(m).__name__ for m in part}))})"
        for name, part in lists.items()
    ]
    raise LayoutError(
        f"{type(model).__name__} has no list of decoder blocks: "
        + ("its lists are " + "; ".join(found) if found else "it has no nn.ModuleList at all"),
        expected="an nn.ModuleList of blocks of one class"
        + (f", {layers} of them by its config" if layers else ""),
    )


def _probe(model: nn.Module, blocks: list[nn.Module]) -> dict[nn.Module, _Call]:
    """The first call of every module inside the blocks during one pass of five tokens."""
    calls: dict[nn.Module, _Call] = {}

    def seen(module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        given = list(_tensors((kwargs.get("hidden_states"), args, kwargs)))
        first, gave = (next(iter(found), None) for found in (given, _tensors(out)))
        streams = len({id(tensor) for tensor in given})
        calls.setdefault(module, _Call(len(calls), first, gave, streams))

    # The first parameter is the embedding's in a decoder: its device takes the ids.
    first = next(model.parameters(), None)
    ids = torch.arange(PROBE_TOKENS, device=None if first is None else first.device)[None]
    with ExitStack() as stack:
        for part in {part: None for block in blocks for part in block.modules()}:
            handle = part.register_forward_hook(seen, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise LayoutError(
                f"{type(model).__name__} failed on {PROBE_TOKENS} token ids: {error}",
                expected="a causal language model called with input_ids and attention_mask",
            ) from error
    return calls


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module gets its own mode back."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor [1, tokens, width] in a call's arguments or result, in order."""
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, PROBE_TOKENS):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _layout(blocks: list[nn.Module], calls: Mapping[nn.Module, _Call]) -> Layout:
    """The layout of a list of blocks, if that is what they are."""
    uncalled = [index for index, block in enumerate(blocks) if block not in calls]
    if uncalled:
        raise LayoutError(f"blocks {uncalled} were not called")
    orders = [calls[block].order for block in blocks]
    if orders != sorted(orders):
        raise LayoutError("the blocks were not called in order")
    shapes = {_shape(t) for block in blocks for t in (calls[block].given, calls[block].gave)}
    if len(shapes) != 1 or None in shapes:
        raise LayoutError(
            f"the blocks take and return {sorted(map(str, shapes))}",
            expected="one shape [1, tokens, d] for all",
        )
    found = tuple(_block(index, block, calls) for index, block in enumerate(blocks))
    widths = {_shape(calls[block.attention_out].given) for block in found}
    if len(widths) != 1:
        raise LayoutError(f"heads of several widths: {sorted(map(str, widths))}", expected="one")
    (shape,), (heads,) = shapes, widths
    assert shape is not None and heads is not None
    return Layout(found, width=shape[-1], heads_width=heads[-1])


def _block(index: int, block: nn.Module, calls: Mapping[nn.Module, _Call]) -> Block:
    """The parts of one block."""
    children = sorted(
        (child for child in block.children() if child in calls), key=lambda c: calls[c].order
    )
    where = f"block {index} ({type(block).__name__}) with the parts " + ", ".join(
        f"{name} ({type(child).__name__})" for name, child in block.named_children()
    )
    attentions = [child for child in children if _takes_attention_arguments(child)]
    if len(attentions) != 1:
        raise LayoutError(
            f"{where}: {len(attentions)} of them look like self-attention",
            expected="one whose forward takes " + " or ".join(sorted(ATTENTION_ARGUMENTS)),
        )
    (attention,) = attentions
    mlps = [child for child in children if child is not attention and _matrices(child) >= 2]
    if len(mlps) != 1:
        raise LayoutError(
            f"{where}: {len(mlps)} of them look like an MLP",
            expected="one, besides attention, with at least two weight matrices",
        )
    (mlp,) = mlps
    if calls[mlp].streams != 1:
        raise LayoutError(
            f"{where}: its MLP gets {calls[mlp].streams} streams, so its output may hold the "
            "residual stream too",
            expected="an MLP with one input",
        )
    linears = [part for part in attention.modules() if part in calls and _is_linear(part)]
    out = max(linears, key=lambda part: calls[part].order, default=None)
    if out is None or not _equal(calls[out].gave, calls[attention].gave):
        raise LayoutError(
            f"{where}: the output of the last linear map in its attention is not the output of "
            "attention",
            expected="an output projection that ends the attention module",
        )
    norms = [child for child in children if child not in (attention, mlp) and not _matrices(child)]
    return Block(
        module=block,
        attention=attention,
        attention_out=out,
        mlp=mlp,
        attention_norm=_feeding(norms, attention, calls),
        mlp_norm=_feeding(norms, mlp, calls),
    )


def _feeding(
    norms: list[nn.Module], part: nn.Module, calls: Mapping[nn.Module, _Call]
) -> nn.Module | None:
    """The norm whose output a part gets: the very tensor, else the only one with equal values.

    Identity goes first because two untrained norms of one input give equal values; a module that
    returns its input unchanged (dropout at evaluation) is no norm.
    """
    given = calls[part].given
    changing = [n for n in norms if not _equal(calls[n].given, calls[n].gave)]
    same = [n for n in changing if calls[n].gave is given]
    equal = same or [n for n in changing if _equal(calls[n].gave, given)]
    return equal[0] if len(equal) == 1 else None


def _takes_attention_arguments(module: nn.Module) -> bool:
    return bool(ATTENTION_ARGUMENTS & set(inspect.signature(module.forward).parameters))


def _matrices(module: nn.Module) -> int:
    """Number of weights with two axes or more (three: stacked experts)."""
    return sum(weight.ndim >= 2 for weight in module.parameters())


def _is_linear(module: nn.Module) -> bool:
    """A leaf with one weight matrix: nn.Linear, Conv1D and their quantised forms."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not any(module.children())


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return one is other or bool(torch.equal(one.cpu(), other.cpu()))
