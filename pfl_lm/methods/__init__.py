"""The methods, by the name a recipe gives them."""

from pfl_lm.methods.base import (
    Broadcast,
    ClientInfo,
    ClientState,
    LocalRun,
    Method,
    ServerState,
    Setup,
    Upload,
)
from pfl_lm.methods.ditto import Ditto
from pfl_lm.methods.fedadam import FedAdam
from pfl_lm.methods.fedavg import FedAvg
from pfl_lm.methods.fedavgm import FedAvgM
from pfl_lm.methods.fedprox import FedProx
from pfl_lm.methods.fedsa_lora import FedSALora
from pfl_lm.methods.ffa_lora import FFALora
from pfl_lm.methods.flexlora import FlexLora
from pfl_lm.methods.hetlora import HetLora
from pfl_lm.methods.local import Local
from pfl_lm.methods.pflalign import PFLAlign
from pfl_lm.methods.rolora import RoLora
from pfl_lm.methods.scaffold import Scaffold

METHODS: dict[str, type[Method]] = {
    "pflalign": PFLAlign,
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "scaffold": Scaffold,
    "ditto": Ditto,
    "ffa_lora": FFALora,
    "fedsa_lora": FedSALora,
    "rolora": RoLora,
    "flexlora": FlexLora,
    "hetlora": HetLora,
    "local": Local,
}

__all__ = [
    "METHODS",
    "Broadcast",
    "ClientInfo",
    "ClientState",
    "LocalRun",
    "Method",
    "ServerState",
    "Setup",
    "Upload",
]
