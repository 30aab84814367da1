"""What the processes of nemo_forks.py have imported: all but vlmsft.runtime.cpu, which test_cpu.py looks for."""

import gc

import lightning.pytorch  # noqa: F401
import nemo_run  # noqa: F401
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from nemo.collections import llm  # noqa: F401

import vlmsft.mllama.model
import vlmsft.recipe
import vlmsft.train  # noqa: F401

Singleton._instances.pop(Plugins, None)  # NeMo had them searched, before a test's are on the path
gc.collect()
gc.freeze()  # else each collection of a fork would go through all of NeMo's objects, and copy their pages
