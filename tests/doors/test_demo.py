"""What a user sees first: `python train.py`, and the stories that its model tells."""

import os
import re
import subprocess

import pytest
from tiny_run import DOOR, REPOSITORY

from llama_jax import LLM
from llama_jax.stories import stories
from llama_jax.stories.recognition import could_be_told

COUNT = 100


@pytest.mark.slow  # two minutes on two cores of its own, four beside other tests
def test_the_demo_tells_new_stories_that_mix_nothing_up(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    lines = subprocess.run(
        DOOR, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", lines)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.17
    assert lines.endswith("sample with: python sample.py --ckpt ckpt --prompt 'Once upon a time'\n")

    model = LLM(tmp_path / "ckpt")
    told = model.complete("Once upon a time", n=COUNT, temperature=0.8, seed=1, echo=True)
    texts = [choice.text.strip() for choice in told]
    # 98 or 99 of 100 with most seeds; what the count misses is one sentence or one thing.
    assert sum(map(could_be_told, texts)) >= 0.9 * COUNT
    assert len(set(texts) - set(stories("train", 20_000))) >= 0.9 * COUNT
