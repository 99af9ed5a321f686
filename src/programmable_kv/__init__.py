"""programmable-kv: edit the content of a transformer's KV cache at the price of the tokens touched."""

from programmable_kv.account import Account
from programmable_kv.agent.agent import Agent, Turn
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import ProgrammableKVError
from programmable_kv.models.load import Model, load_model, wrap_model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.skills.skill import Skill

__version__ = "0.1.0"

__all__ = [
    "Account",
    "Agent",
    "Decision",
    "Engine",
    "Mode",
    "Model",
    "Notebook",
    "ProgrammableKVError",
    "Rows",
    "SeamRepair",
    "Skill",
    "Turn",
    "__version__",
    "load_model",
    "wrap_model",
]
