"""The list of models. A further model adds its own modules, its name here and its table in the default settings."""

from __future__ import annotations

from collections.abc import Mapping

from forecasters.chronos2_model import CHRONOS2
from forecasters.descriptor import Model
from forecasters.kronos_model import KRONOS
from forecasters.naive import NAIVE
from forecasters.toto2_model import TOTO2
from forecasters.toto_model import TOTO

MODELS: Mapping[str, Model] = {model.name: model for model in (TOTO, KRONOS, CHRONOS2, TOTO2, NAIVE)}
