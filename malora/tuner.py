"""MALoRA as a PEFT tuner: what `get_peft_model(model, MaloraConfig(...))` puts on a model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from malora import basis as bases
from malora.config import DEFAULT_TARGET_MODULES, MaloraConfig
from malora.layer import MERGE_REFUSED, MaloraLinear, RoutingRecord
from malora.router import load_balancing_loss
from malora.spec import base_model_fingerprint


class MaloraModel(BaseTuner):
    """Puts MALoRA adapters on a model's linears, and the load-balancing loss on its training loss.

    The loss is added by hooks on the base model itself, so that it is there whichever way the
    model is called: through PeftModel, through one of its subclasses, or directly.
    """

    prefix = "malora_"
    tuner_layer_cls = MaloraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (declared so by PEFT)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # PEFT's constructor injects the first adapter, which already needs these two.
        self._record = RoutingRecord()
        self._bases: dict[str, dict[str, Tensor]] = {}
        super().__init__(model, *args, **kwargs)
        self._hooks = (
            model.register_forward_pre_hook(self._start_record),
            model.register_forward_hook(self._add_auxiliary_loss, with_kwargs=True),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model as a module, since some versions of PEFT skip its hooks."""
        return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kw: Any) -> None:
        """Put an adapter on the model, as PEFT does, after checking that it is meant for it.

        Raises ValueError for an adapter of another base model, for a target that is no nn.Linear,
        or for a basis that does not fit.
        """
        config = self.peft_config[adapter_name]
        fingerprint = base_model_fingerprint(model)
        if fingerprint is not None:
            if config.base_model_fingerprint not in (None, fingerprint):
                raise ValueError(
                    f"Adapter {adapter_name!r} was trained on another base model (fingerprint "
                    f"{config.base_model_fingerprint[:12]}, this model's is {fingerprint[:12]}): "
                    "load the model that its base_model_name_or_path names."
                )
            config.base_model_fingerprint = fingerprint
        if config.basis_path is not None:
            self._bases[adapter_name] = bases.load_basis(config.basis_path)
        super().inject_adapter(model, adapter_name, *args, **kw)
        self._bases.pop(adapter_name, None)

    def _prepare_adapter_config(
        self, peft_config: MaloraConfig, _model_config: dict[str, Any]
    ) -> MaloraConfig:
        if peft_config.target_modules is None:
            present = {
                name.rpartition(".")[2]
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear | MaloraLinear)
            }
            peft_config.target_modules = present & set(DEFAULT_TARGET_MODULES)
            if not peft_config.target_modules:
                raise ValueError(
                    "The model has none of the linears that MALoRA adapts by default "
                    f"({', '.join(DEFAULT_TARGET_MODULES)}): name yours in target_modules."
                )
        return peft_config

    def _create_and_replace(
        self,
        peft_config: MaloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if not isinstance(target, nn.Linear | MaloraLinear):
            raise ValueError(
                f"MALoRA adapts nn.Linear alone, but {current_key} is a {type(target).__name__}: "
                "leave it out of target_modules, or name it in exclude_modules."
            )
        layer = target if isinstance(target, MaloraLinear) else MaloraLinear(target, self._record)
        given = self._bases.get(adapter_name)
        if given is not None and current_key not in given:
            raise ValueError(
                f"The basis of basis_path has nothing for {current_key}: target only the modules "
                "that it was made for."
            )
        try:
            layer.update_layer(
                adapter_name,
                peft_config,
                peft_config.shape_of(current_key),
                None if given is None else given[current_key],
            )
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def unload(self) -> nn.Module:
        """The base model, with every adapter and hook taken off it."""
        for hook in self._hooks:
            hook.remove()
        return super().unload()

    def _start_record(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        self._record.logits.clear()
        self._record.active = module.training and torch.is_grad_enabled()

    def _add_auxiliary_loss(
        self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._record.active = False
        labels = kwargs.get("labels")
        loss = None if labels is None else self._auxiliary_loss(kwargs.get("attention_mask"))
        self._record.logits.clear()
        if labels is None or loss is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + loss * _accumulation_weight(labels, kwargs), *output[1:])
        if getattr(output, "log_probs", None) is not None:
            # TRL's trainers make their own loss of these, and know nothing of ours.
            output.log_probs = CarryLoss.apply(output.log_probs, output.label_mask, loss)
        if output.loss is not None:
            output.loss = output.loss + loss * _accumulation_weight(labels, kwargs)
        return output

    def _auxiliary_loss(self, attention_mask: Tensor | None) -> Tensor | None:
        """Σ over adapters of coefficient · mean balance loss of its routed linears, or None."""
        losses = []
        for adapter, logits in self._record.logits.items():
            config = self.peft_config[adapter]
            if config.router_aux_loss_coef == 0:
                continue
            if not any(each.requires_grad for each in logits) and any(
                layer.malora_router[adapter].requires_grad
                for layer in self.modules()
                if isinstance(layer, MaloraLinear) and adapter in layer.malora_router
            ):
                raise ValueError(
                    "Reentrant gradient checkpointing hides the routers' gradients from the "
                    'load-balancing loss: use gradient_checkpointing_kwargs={"use_reentrant": '
                    "False}, or router_aux_loss_coef=0."
                )
            # Linears of one model see the same tokens, except where a module reshapes them.
            by_rows: dict[int, list[Tensor]] = {}
            for each in logits:
                by_rows.setdefault(each.shape[0], []).append(each)
            total = sum(
                len(group)
                * load_balancing_loss(
                    # A model spread over devices has its linears there too.
                    torch.stack([each.to(group[0].device) for each in group]),
                    config.top_k,
                    _token_mask(rows, attention_mask),
                )
                for rows, group in by_rows.items()
            )
            losses.append(config.router_aux_loss_coef * total / len(logits))
        return torch.stack(losses).sum() if losses else None


def _token_mask(rows: int, attention_mask: Tensor | None) -> Tensor | None:
    """(rows,) of a (batch, tokens) mask; None where there is no mask with one entry a token."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask.flatten() != 0 if attention_mask.numel() == rows else None


def _accumulation_weight(labels: Tensor, kwargs: dict[str, Any]) -> Tensor | float:
    """How large a share of the step this micro-batch is.

    With `num_items_in_batch`, Trainer leaves it to the model to divide its loss by the whole
    step's predicted tokens, and does not divide by the number of micro-batches afterwards.
    """
    total = kwargs.get("num_items_in_batch")
    if total is None:
        return 1.0
    shifted = kwargs.get("shift_labels")
    counted = labels[..., 1:] if shifted is None else shifted
    return (counted != -100).sum() / total


class CarryLoss(torch.autograd.Function):
    """Passes per-token log-probabilities on, and hands a second loss its gradient in backward.

    A loss that averages -log_probs gives each token the gradient -1/items, so the sizes of the
    predicted tokens' gradients sum to the share of the step that this micro-batch is, whatever
    scales the loss on the way.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, mask: Tensor, _loss: Tensor) -> Tensor:
        """log_probs and mask: (batch, tokens), the mask true for predicted tokens; loss: ()."""
        ctx.save_for_backward(mask)
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        """The log-probabilities' gradient untouched, and the second loss's."""
        (mask,) = ctx.saved_tensors
        return gradients[0], None, (gradients[0].abs() * mask).sum()


def register() -> None:
    """Make PEFT know the MALORA method; harmless when it already does.

    PeftType is an enumeration and closed, so the member is added by hand, with the attributes that
    the enum module itself gives its members on Python 3.11 and 3.12.
    """
    if "MALORA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "MALORA")
    member._name_ = member._value_ = "MALORA"
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, "MALORA", member)  # EnumType's own would refuse it
    PeftType._member_names_.append("MALORA")
    PeftType._member_map_["MALORA"] = member
    PeftType._value2member_map_["MALORA"] = member
    register_peft_method(
        name="malora", config_cls=MaloraConfig, model_cls=MaloraModel, prefix=MaloraModel.prefix
    )


register()
