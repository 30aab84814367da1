"""Where the YAML lies, and the resolvers it uses. Imports neither torch nor NeMo: composing must stay cheap."""

from __future__ import annotations

import functools
import os
import secrets
import time
from pathlib import Path

from omegaconf import OmegaConf

GROUPS_BESIDE_CONF = ("launch", "sweeps")
"""Folders beside conf/ that are Hydra groups too."""

DTYPE_OF_PRECISION = {"bf16-mixed": "bfloat16", "16-mixed": "float16", "32": "float32"}
"""Lightning's names for what we train in, and the dtype of the activations."""

SLURM_INTERACTIVE_STEP = 0xFFFFFFFA
"""slurm.h: SLURM_INTERACTIVE_STEP, the shell that salloc opens on a node."""


def root() -> Path:
    """The folder that holds conf/, launch/ and sweeps/: the repository's top in a clone, vlmsft/_config in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_config", package.parent):
        if (folder / "conf" / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no conf/train.yaml in {package / '_config'} or {package.parent}: the installation is broken"
    )


def sample_set() -> str:
    """The folder of the packaged sample data (photographs, JSONL, processor), found without importing anything."""
    return str(Path(__file__).resolve().parent / "data" / "sample")


def absolute_path(path: str) -> str:
    """`path` as seen from the folder the command was typed in (Hydra doesn't change it: hydra.job.chdir=false)."""
    return os.path.abspath(os.path.expanduser(path))


def dtype_of(precision: str | int) -> str:
    """'bfloat16' for 'bf16-mixed' and so on. An unknown precision comes back as it is: the translation names it."""
    return DTYPE_OF_PRECISION.get(str(precision), str(precision))


def run_id() -> str:
    """The id of this run, the same on each rank of one launch, another for each job of a Hydra multirun.

    VLMSFT_RUN_ID if set (a launcher hands it to its workers); under torchrun what rank 0 proposes, shared through the
    agent's store; in a Slurm job its id, so that a requeued job continues its own run; else the time and four digits.
    """
    return _run_id(_multirun_job())


@functools.cache
def _run_id(job: str) -> str:
    environ = os.environ
    if environ.get("VLMSFT_RUN_ID"):
        return environ["VLMSFT_RUN_ID"] + job
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _agree_through_torchrun(_process_id() + job, job)
    return _process_id() + job


@functools.cache
def _process_id() -> str:
    """One per process, so that the jobs of a multirun differ in their number only.

    Two commands that start in the same second differ in the four random digits: 20261124-061530-3f2a.
    """
    return _slurm_id() or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _slurm_id() -> str | None:
    # SLURM_PROCID is there for what the job itself runs, not for commands typed into a shell that holds an allocation:
    # those are separate runs that share a job id.
    step = int(os.environ.get("SLURM_STEP_ID", "0"))
    if "SLURM_JOB_ID" not in os.environ or "SLURM_PROCID" not in os.environ or step == SLURM_INTERACTIVE_STEP:
        return None
    job = os.environ["SLURM_JOB_ID"]
    return (
        f"{job}-{step}" if 0 < step < SLURM_INTERACTIVE_STEP else job
    )  # the ids above are Slurm's own (batch, extern)


def _multirun_job() -> str:
    """'-3' in job 3 of a multirun, '' elsewhere."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized():
        return ""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or OmegaConf.is_missing(hydra.job, "num"):
        return ""
    return f"-{hydra.job.num}"


def _agree_through_torchrun(proposal: str, job: str) -> str:
    """Rank 0's first proposal, kept in the store of torchrun's agent, which outlives restarts of the workers."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] # documented under this name

    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(minutes=5)
    )
    key = f"vlmsft/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/run_id{job}"
    if os.environ.get("RANK", "0") == "0":
        return store.compare_set(key, "", proposal).decode()  # a restarted rank 0 gets the id of the first start
    return store.get(key).decode()  # waits for rank 0


def register_resolvers() -> None:
    """Makes ${run_id:} and the others known to OmegaConf. Safe to call again."""
    resolvers = {
        "run_id": run_id,
        "sample_set": sample_set,
        "absolute_path": absolute_path,
        "folder_of": lambda path: os.path.dirname(path),
        "last_part_of": lambda path: os.path.basename(path.rstrip("/")),
        "dtype_of": dtype_of,
        "first_of": lambda *values: next((str(value) for value in values if value is not None), None),
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
