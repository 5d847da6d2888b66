"""The names requests may give as `model`: the base model and the adapters on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from malora_server.api.errors import ApiError
from malora_server.engine.messages import AdapterInfo
from malora_server.settings import StartError

_FINGERPRINT_LENGTH = 16


@dataclass(frozen=True)
class ServedModel:
    """What a name stands for: an adapter's generation, or the base model (`adapter` None)."""

    name: str
    created: int
    adapter: AdapterInfo | None = None

    @property
    def digest(self) -> str | None:
        """The adapter's content digest."""
        return self.adapter.digest if self.adapter else None

    @property
    def fingerprint(self) -> str:
        """What `system_fingerprint` says: it changes when the adapter's content does."""
        return self.adapter.digest[:_FINGERPRINT_LENGTH] if self.adapter else "base"


class ModelRegistry:
    """Looks models up by name."""

    def __init__(self, base_name: str, adapters: Sequence[AdapterInfo]) -> None:
        """Raises StartError where an adapter bears the base model's name."""
        if any(adapter.name == base_name for adapter in adapters):
            raise StartError(
                f"adapter {base_name!r} has the base model's name; rename its folder, or name the "
                "base model with --served-model-name"
            )
        self.base = ServedModel(base_name, int(time.time()))
        self.update(adapters)

    def update(self, adapters: Sequence[AdapterInfo]) -> None:
        """Know these adapters, and no others; one with the base model's name is left out."""
        adapters = [adapter for adapter in adapters if adapter.name != self.base.name]
        self.adapters = {adapter.name: adapter for adapter in adapters}
        """Every adapter, the broken ones included."""
        served = (
            ServedModel(adapter.name, adapter.created, adapter)
            for adapter in adapters
            if adapter.error is None
        )
        self.models = {self.base.name: self.base, **{model.name: model for model in served}}
        """What can be asked for, the base model first."""

    def resolve(self, name: str, *, param: str | None = "model") -> ServedModel:
        """The model of that name; ApiError 404 where none is, 400 where its adapter is broken."""
        model = self.models.get(name)
        if model is not None:
            return model
        self.adapter(name, param=param)
        raise ApiError(
            400,
            f"Adapter {name!r} can't be served: {self.adapters[name].error}",
            code="adapter_invalid",
            param=param,
        )

    def adapter(self, name: str, *, param: str | None = None) -> AdapterInfo:
        """What is known of an adapter, broken or not; ApiError 404 where there is none."""
        adapter = self.adapters.get(name)
        if adapter is None:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; GET /v1/models lists those that do.",
                code="model_not_found",
                param=param,
            )
        return adapter
