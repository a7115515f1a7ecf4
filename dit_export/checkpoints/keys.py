"""The names of a DiT's tensors here, in Meta's code and in diffusers, as two tables that read both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dit_export.checkpoints.files import check
from dit_export.networks.dit import DiT, position_table
from dit_export.networks.spec import ModelSpec
from dit_runtime.errors import UsageError

# Ours -> theirs. N: every block; *: weight and bias; {q,k,v}: so many tensors of theirs, stacked along our rows. What a
# network's conditioning does not have is left out.
META = {
    "positions": "pos_embed",
    "patches.*": "x_embedder.proj.*",
    "embedders.0.time.0.*": "t_embedder.mlp.0.*",
    "embedders.0.time.2.*": "t_embedder.mlp.2.*",
    "embedders.0.label.weight": "y_embedder.embedding_table.weight",
    "blocks.N.modulation.*": "blocks.N.adaLN_modulation.1.*",
    "blocks.N.norm1.*": "blocks.N.norm1.*",
    "blocks.N.attn.qkv.*": "blocks.N.attn.qkv.*",
    "blocks.N.attn.proj.*": "blocks.N.attn.proj.*",
    "blocks.N.norm_cross.*": "blocks.N.norm_cross.*",
    "blocks.N.cross.q.*": "blocks.N.cross_attn.q.*",
    "blocks.N.cross.kv.*": "blocks.N.cross_attn.kv.*",
    "blocks.N.cross.proj.*": "blocks.N.cross_attn.proj.*",
    "blocks.N.norm2.*": "blocks.N.norm2.*",
    "blocks.N.mlp.fc1.*": "blocks.N.mlp.fc1.*",
    "blocks.N.mlp.fc2.*": "blocks.N.mlp.fc2.*",
    "final.modulation.*": "final_layer.adaLN_modulation.1.*",
    "final.norm.*": "final_layer.norm_final.*",
    "final.linear.*": "final_layer.linear.*",
}
DIFFUSERS = {
    "patches.*": "pos_embed.proj.*",
    "embedders.N.time.0.*": "transformer_blocks.N.norm1.emb.timestep_embedder.linear_1.*",
    "embedders.N.time.2.*": "transformer_blocks.N.norm1.emb.timestep_embedder.linear_2.*",
    "embedders.N.label.weight": "transformer_blocks.N.norm1.emb.class_embedder.embedding_table.weight",
    "blocks.N.modulation.*": "transformer_blocks.N.norm1.linear.*",
    "blocks.N.attn.qkv.*": "transformer_blocks.N.attn1.to_{q,k,v}.*",
    "blocks.N.attn.proj.*": "transformer_blocks.N.attn1.to_out.0.*",
    "blocks.N.mlp.fc1.*": "transformer_blocks.N.ff.net.0.proj.*",
    "blocks.N.mlp.fc2.*": "transformer_blocks.N.ff.net.2.*",
    "final.modulation.*": "proj_out_1.*",
    "final.linear.*": "proj_out_2.*",
}


def dialect(names: Mapping[str, object], where: str) -> dict[str, str]:
    """The table these names come from."""
    for table in (META, DIFFUSERS):
        if table["patches.*"].replace("*", "weight") in names:
            return table
    some = ", ".join(list(names)[:3]) or "nothing"
    raise UsageError(
        f"{where}: not the weights of a DiT: neither x_embedder.proj.weight (Meta's keys) nor pos_embed.proj.weight "
        f"(diffusers') is there; it holds {some} …"
    )


def depth_of(names: Mapping[str, object]) -> int:
    """Return how many blocks the names count, in either dialect."""
    return len({match[1] for match in map(re.compile(r"(?:transformer_)?blocks\.(\d+)\.").match, names) if match})


def expand(table: dict[str, str], depth: int) -> dict[str, list[str]]:
    """Our name -> theirs: one, or some to be stacked."""
    names = {}
    for ours, theirs in table.items():
        for n in range(depth) if ".N." in ours else [0]:
            for leaf in ("weight", "bias") if "*" in ours else [""]:
                key = theirs.replace(".N.", f".{n}.").replace("*", leaf)
                several = re.search(r"\{(.+)\}", key)
                parts = [key.replace(several[0], part) for part in several[1].split(",")] if several else [key]
                names[ours.replace(".N.", f".{n}.").replace("*", leaf)] = parts
    return names


def read(state: dict[str, Tensor], table: dict[str, str], spec: ModelSpec, where: str) -> DiT:
    """The network in float32, its tensors taken out of `state`; copies of one embedder become one."""
    if table is DIFFUSERS:
        spec = replace(spec, embedders=spec.depth)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(spec).state_dict().items()}
    names = {name: parts for name, parts in expand(table, spec.depth).items() if name in shapes}
    if names.get("positions", [""])[0] not in state:
        names.pop("positions", None)
    expected: dict[str, tuple[int, ...]] = {}
    for name, parts in names.items():
        rows, *rest = shapes[name]
        expected |= dict.fromkeys(parts, (rows // len(parts), *rest))
    check(state, expected, where)

    ours = {}
    for name, parts in names.items():
        tensors = [state.pop(part).float() for part in parts]
        ours[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if "positions" not in ours:
        ours["positions"] = position_table(spec.hidden, spec.grid, spec.position_span)
    copies = [name for name in ours if re.match(r"embedders\.(?!0\.)", name)]
    if all(torch.equal(ours[name], ours[re.sub(r"\d+", "0", name, count=1)]) for name in copies):
        spec = replace(spec, embedders=1)
        for name in copies:
            del ours[name]

    return network(spec, ours)


def network(spec: ModelSpec, state: Mapping[str, Tensor]) -> DiT:
    with torch.device("meta"):
        model = DiT(spec)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def without_variance(model: DiT) -> DiT:
    """The prediction alone: SiT's checkpoints have the channels of a variance that nothing trains or reads."""
    if not model.spec.learned_variance:
        return model
    spec, state = replace(model.spec, learned_variance=False), model.state_dict()
    for name in ("final.linear.weight", "final.linear.bias"):
        state[name] = state[name].unflatten(0, (spec.patch**2, -1))[:, : spec.channels].flatten(0, 1)  # (p·p·C, …)
    return network(spec, state)


def write(model: DiT, table: dict[str, str]) -> dict[str, Tensor]:
    """Return a state dict with the other code's names: the reverse of `read`."""
    ours = model.state_dict()
    theirs = {}
    for name, parts in expand(table, model.spec.depth).items():
        if name not in ours:  # a block's copy of the one embedder
            name = re.sub(r"^embedders\.\d+", "embedders.0", name)
        if name not in ours:  # of another conditioning
            continue
        for part, tensor in zip(parts, ours[name].chunk(len(parts)), strict=True):
            theirs[part] = tensor.clone()
    return theirs
