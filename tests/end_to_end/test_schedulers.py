"""Launch files for several machines: what Slurm and Kubernetes would start, with stand-ins for their commands."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from train.config.stage import load_stage

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "scripts/slurm.sh"
STAND_INS = {
    # as Slurm: every task on some node, the highest exit code of all
    "srun": """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=0 ]] && shift
worst=0
for rank in 0 1 2 3; do
  SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || { code=$?; [ $code -gt $worst ] && worst=$code; }
done
exit $worst
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'nodeA\\nnodeB\\n'; else echo "$@" >> "$LOG.scontrol"; fi
""",
    "python": """#!/usr/bin/env bash
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$LOG"
exit $CODE
""",
}


def submitted(folder: Path, code: int, *arguments: str, **environment: str) -> tuple[int, list[str], list[str]]:
    """(exit code, what each process was started with, what scontrol was told) of slurm.sh on 2 nodes of 2 tasks."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_NODELIST": "node[A-B]", "SLURM_JOB_ID": "71234", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    ours = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python", "LOG": str(folder / "log"), "CODE": str(code)}
    done = subprocess.run([str(SLURM), *arguments], env={**ours, **slurm, **environment}, check=False, capture_output=True)
    logs = [folder / "log", folder / "log.scontrol"]
    started, told = (log.read_text().splitlines() if log.is_file() else [] for log in logs)
    return done.returncode, started, told


def test_slurm_starts_a_process_for_each_gpu(tmp_path: Path) -> None:
    code, started, told = submitted(tmp_path, 0, "--config", "a b.yaml", "x=[1, 2]")
    assert code == 0
    ours = "train/run.py --config a b.yaml x=[1, 2]"
    assert started == [f"{rank} 4 {rank % 2} 2 nodeA 21234 {ours}" for rank in range(4)]
    assert told == []


@pytest.mark.parametrize(("code", "array", "told"), [(85, "", ["requeue 71234"]), (85, "3", []), (7, "", []), (9, "", [])])
def test_slurm_queues_again_what_was_stopped_and_nothing_else(code: int, array: str, told: list[str], tmp_path: Path) -> None:
    environment = {"SLURM_ARRAY_TASK_ID": array} if array else {}
    assert submitted(tmp_path, code, "--config", "x.yaml", **environment)[::2] == (code, told)


def test_slurm_without_a_stage_says_how_it_is_used(tmp_path: Path) -> None:
    assert submitted(tmp_path, 0)[:2] == (2, [])


def test_first_lines_are_commands_of_files_that_exist() -> None:
    found = {"sbatch": SLURM.read_text().splitlines()[1]}
    for path in sorted((ROOT / "configs/launch").glob("*.yaml")):
        found[path.name] = path.read_text().splitlines()[0]
    for name in ("sbatch", "multi_node.yaml", "kubernetes.yaml", "fsdp2.yaml"):
        assert found[name].startswith(("# sbatch ", "# accelerate launch ", "# kubectl apply ")), name
        files = [word for word in found[name].split() if word.endswith((".sh", ".yaml", ".py"))]
        assert files
        assert all((ROOT / file).is_file() for file in files), found[name]


def test_the_shell_file_is_sound() -> None:
    assert os.access(SLURM, os.X_OK)
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def test_kubernetes_pods_are_the_processes_of_one_stage(tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((ROOT / "configs/launch/kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["completionMode"], spec["completions"], service["spec"]["clusterIP"]) == ("Indexed", spec["parallelism"], "None")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    script = container["command"][-1]
    said = tmp_path / "said"
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {said}\n')
    torchrun.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": "2"}
    subprocess.run(["bash", "-c", script.replace(".venv/bin/torchrun", str(torchrun))], env=environment, check=True)
    words = said.read_text().split()
    options = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--") and "=" in word)
    assert options["node-rank"] == "2"
    assert options["nnodes"] == str(spec["completions"])
    assert options["nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options["master-addr"] == f"{job['metadata']['name']}-0.{pod['subdomain']}" == f"anix-0.{service['metadata']['name']}"
    stage = load_stage([words[words.index("--config") + 1]])
    assert stage.running.tiles_per_update % (spec["completions"] * int(options["nproc-per-node"])) == 0
