"""Makes plans.json: what the TPU compiler says that each shipped config takes on each TPU target.

    python tests/golden/make_plans.py [NAME ...]

Needs libtpu, and a minute or two for each program. What plans.json has already is kept, so that it
can be interrupted; delete the file to make all anew. Names, such as "7b v5p-64", make some only.
`tests/planning/test_estimates.py` holds the estimates against it.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax

from llama_jax import cli
from llama_jax.config import Config
from llama_jax.config_parsing import parse
from llama_jax.planning.alternatives import estimate
from llama_jax.planning.table import TARGETS, on_all_chips
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training_plan import compile_training

HERE = Path(__file__).resolve().parent
PLANS = HERE / "plans.json"


def shipped_configs():
    """Every config in configs/, by name."""
    paths = sorted((HERE.parents[1] / "configs").glob("*.py"))
    return {path.stem: parse(Config, cli.config_from_flags([], str(path))) for path in paths}


def main():
    """Compile what is missing, and write after each."""
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    recorded = json.loads(PLANS.read_text()) if PLANS.exists() else {"plans": {}}
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
    recorded = {"versions": versions} | recorded
    assert recorded["versions"] == versions, f"made by {recorded['versions']}; delete {PLANS}"
    targets = [parse_target(name) for name in TARGETS]
    for name, config in shipped_configs().items():
        for target in targets:
            key, way = f"{name} {target.name}", on_all_chips(config, target.devices)
            is_asked = key in (sys.argv[1:] or [key]) and target.chip.is_tpu and way is not None
            if key in recorded["plans"] or not is_asked:
                continue
            made = compile_training(estimate(way, target), target)
            gib = round(made.total / 2**30, 4)
            recorded["plans"][key] = {"gib": gib, "fits": made.fits}
            print(f"{key}: {gib} GiB{'' if made.fits else ', too large'}, {made.seconds:.0f} s")
            PLANS.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
