"""Protects: the tutorial on own data and rewards runs as it is printed (with fewer steps)."""

import json
import re
import runpy
import shlex
from pathlib import Path

from d1jax import evaluate, train

PAGE = (Path(__file__).parents[1] / "docs" / "own_data.md").read_text()
MAINS = {"d1jax.train": train.main, "d1jax.evaluate": evaluate.main}
FEWER = {"d1jax.train": ["--sft.steps", "3", "--rl.steps", "2", "--rl.prompts_per_step", "4"], "d1jax.evaluate": []}


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"```(?:python|yaml) (\S+)\n(.*?)```", PAGE, re.DOTALL):
        Path(name).write_text(text)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in commands.splitlines():
        words = shlex.split(line)
        if words[1] == "make_rows.py":
            runpy.run_path("make_rows.py")
            continue
        assert MAINS[words[2]](words[3:] + FEWER[words[2]]) == 0, line
    metrics = [json.loads(line) for line in Path("runs/sums/metrics.jsonl").read_text().splitlines()]
    assert {"rewards/my_rewards.py:short/mean", "rewards/solved/mean"} <= metrics[-1].keys()
    assert metrics[-1]["rewards/failures"] == 0
    assert "jsonl" in capsys.readouterr().out and Path("evaluations/sums/report.html").exists()
