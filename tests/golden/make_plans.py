"""Makes plans.json: what the TPU compiler says that each shipped config takes on each TPU target
(fine-tuning of 7B on the smallest that holds it), and a shallow 7B on meshes with a tensor axis,
with and without mesh.sequence; and what decoding takes.

    python tests/golden/make_plans.py [NAME ...]

Needs libtpu, and a minute or two for each program. What plans.json has already is kept, so that it
can be interrupted; delete the file to make all anew. Names, such as "7b v5p-64", make some only.
`tests/planning/test_recorded_plans.py` holds the estimates against it.
"""

import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax

from llama_jax.cli.config_flags import read_config
from llama_jax.planning.decoding import DecodingOptions, compile_decoding, plan_decoding
from llama_jax.planning.report import TARGETS, over_all_chips
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import compile_training, estimate

HERE = Path(__file__).resolve().parent
PLANS = HERE / "plans.json"
ON_TENSOR_MESHES = {  # few rows and many, one axis and two, each policy; some too large
    "v5e-8": (
        "fsdp=1 tensor=8 sequence=true batch_size=8 remat=block",
        "fsdp=1 tensor=8 sequence=true batch_size=64 remat=block",
        "fsdp=1 tensor=8 sequence=true batch_size=160 remat=block",
        "fsdp=1 tensor=8 sequence=true batch_size=190 remat=block",
        "fsdp=1 tensor=8 sequence=false batch_size=64 remat=block",
        "fsdp=1 tensor=8 sequence=true batch_size=16 remat=none",
        "fsdp=1 tensor=8 sequence=false batch_size=16 remat=none",
        "fsdp=2 tensor=4 sequence=true batch_size=32 remat=block",
        "fsdp=2 tensor=4 sequence=false batch_size=32 remat=block",
        "fsdp=2 tensor=4 sequence=true batch_size=32 remat=save-qkv",
        "fsdp=2 tensor=4 sequence=true batch_size=16 remat=none",
    ),
    "v6e-8": ("fsdp=1 tensor=8 sequence=true batch_size=16 remat=none",),
    "v5p-64": ("data=4 fsdp=1 tensor=8 sequence=true batch_size=480 remat=block",),
}
FINE_TUNING = {"alpaca_7b_lora": ("v6e-1",), "alpaca_7b_qlora": ("v5e-1",)}  # on these alone
DECODING = (  # narrow heads and wide ones, a table that tiles pad and one not, int4 and int8 tables
    "15m v5e-1",
    "15m v5e-1 batch=8",
    "15m v5e-1 quantize=int8",
    "15m v5e-1 quantize=int4",
    "15m v5e-1 quantize=int4 batch=4",
    "15m v5e-1 quantize=int4 batch=8",
    "15m v5e-4 quantize=int4",
    "42m v5e-1",
    "42m v5e-1 quantize=int4",
    "42m v5e-1 quantize=int4 batch=8",
    "110m v5e-1",
    "110m v5e-1 quantize=int8",
    "110m v5e-1 quantize=int4",
    "110m v5e-4 batch=8",
    "110m v5e-4 batch=8 quantize=int4",
)


def shipped_configs():
    """Every config in configs/, by name."""
    paths = sorted((HERE.parents[1] / "configs").glob("*.py"))
    return {path.stem: read_config(str(path)) for path in paths}


def on_tensor_meshes():
    """Configs on meshes with a tensor axis, by key: name, target, and what differs."""
    shallow = "--config.model.num_layers=4 --config.optimizer.accumulation_steps=1"
    section = {"batch_size": "data", "remat": "run"}
    path = str(HERE.parents[1] / "configs" / "7b.py")
    for target, ways in ON_TENSOR_MESHES.items():
        for way in ways:
            words = [
                f"--config.{section.get(word.partition('=')[0], 'mesh')}.{word}"
                for word in way.split()
            ]
            yield f"7b {target} {way}", read_config(path, [*shallow.split(), *words])


def planned():
    """Every plan to record, by key: the config as it runs, and its target."""
    for name, config in shipped_configs().items():
        targets = FINE_TUNING.get(name, ()) if config.run.init_from else TARGETS
        for target in map(parse_target, targets):
            way = over_all_chips(config, target.devices)
            if target.chip.is_tpu and way is not None:
                yield f"{name} {target.name}", way, target
    for key, config in on_tensor_meshes():
        yield key, config, parse_target(key.split()[1])


def decoded():
    """Every decode plan to record, by key: its arguments of `plan_decoding`."""
    configs = shipped_configs()
    for key in DECODING:
        name, target, *words = key.split()
        options = dict(word.split("=") for word in words)
        batch = int(options.pop("batch", 1))
        yield (
            key,
            configs[name].model,
            DecodingOptions(batch=batch, **options),
            parse_target(target),
        )


def programs():
    """Every program to record: the section of plans.json, its key there, and what compiles it."""
    for key, way, target in planned():
        yield "plans", key, partial(_train_step, way, target)
    for key, *plan in decoded():
        yield "decoding", key, partial(_decode_loop, *plan)


def _train_step(config, target):
    return compile_training(estimate(config, target), target)


def _decode_loop(model, options, target):
    return plan_decoding(model, options, target, compile_decoding).compiled


def main():
    """Compile what is missing, and write after each."""
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    recorded = json.loads(PLANS.read_text()) if PLANS.exists() else {"plans": {}, "decoding": {}}
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
    recorded = {"versions": versions} | recorded
    assert recorded["versions"] == versions, f"made by {recorded['versions']}; delete {PLANS}"
    for section, key, compile_it in programs():
        if key in recorded[section] or key not in (sys.argv[1:] or [key]):
            continue
        start = time.perf_counter()
        made = compile_it()
        seconds = time.perf_counter() - start
        gib = round(made.total / 2**30, 4)
        recorded[section][key] = {"gib": gib, "fits": made.fits}
        print(f"{key}: {gib} GiB{'' if made.fits else ', too large'}, {seconds:.0f} s")
        PLANS.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
