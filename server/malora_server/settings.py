"""The server's settings: every field is a flag of `malora serve` and a `MALORA_` variable."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    ByteSize,
    DirectoryPath,
    Field,
    FilePath,
    HttpUrl,
    PositiveInt,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

EMBEDDED_BASE_NAME = "malora-base"


class StartError(Exception):
    """The server can't start; the message is one sentence for the person who started it."""


def embedded_base() -> str:
    """Path of the base model that ships with the package."""
    return str(import_module("malora.base_model").PATH)


class Settings(BaseSettings):
    """Serve MALoRA, LoRA, MoLoRA and HydraLoRA adapters together on one base model."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="MALORA_",
        extra="forbid",
        validate_default=False,
        cli_prog_name="malora serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )

    base: str = Field(
        default_factory=embedded_base,
        description="Folder or Hub id of the base model; left out, the small one that ships along.",
    )
    served_model_name: str | None = Field(
        None,
        min_length=1,
        description="Name that requests give the base model; left out, the last part of --base.",
    )
    adapters: DirectoryPath | None = Field(
        None, description="Folder whose subfolders are adapters, each served under its own name."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision; auto is float32 on the CPU, the checkpoint's on CUDA."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto is CUDA where there is a device."
    )
    quantization: Literal["fp8", "int8"] | None = Field(
        None,
        description="Quantise the decoder layers' weights as they are read: fp8 (activations too; "
        "CUDA 8.9 or later) is faster and half the size, int8 is smaller alone. Needs torchao.",
    )
    max_model_len: PositiveInt | None = Field(
        None, description="Longest prompt plus reply, in tokens; left out, the model's own limit."
    )
    max_num_seqs: PositiveInt = Field(256, description="Most sequences that run in one step.")
    max_num_batched_tokens: PositiveInt = Field(
        2048, description="Most tokens in one step, prompt chunks and new tokens together."
    )
    max_slowdown: float = Field(
        1.5,
        ge=1,
        description="How many times as long requests may take because another adapter has far more "
        "of them here; inf lets those fill every step.",
    )
    block_size: PositiveInt = Field(16, description="Tokens in one block of the KV cache.")
    kv_cache_memory: ByteSize | None = Field(
        None, description="Memory for the KV cache, such as 4GiB; left out, the engine chooses."
    )
    adapter_device_memory: ByteSize | None = Field(
        None,
        description="Device memory for adapters, such as 2GiB; left out, a tenth of what the "
        "weights leave on a GPU, 1GiB on the CPU.",
    )
    adapter_host_memory: ByteSize | None = Field(
        None,
        description="Host memory for adapters, those on the device included; left out, 4GiB more "
        "than on the GPU, 2GiB on the CPU.",
    )
    enable_prefix_caching: bool = Field(
        True, description="Reuse the keys and values of prompts that begin alike."
    )
    max_queued_requests: PositiveInt = Field(
        1024, description="Most sequences that wait for a place; further requests get a 429."
    )
    max_queued_tokens: PositiveInt = Field(
        2**20,
        description="Most tokens of prompts that wait for their first token; further requests get "
        "a 429.",
    )
    max_requests_per_key: PositiveInt | None = Field(
        None, description="Most requests of one API key in flight; further ones get a 429."
    )
    max_body_size: ByteSize = Field(ByteSize(8 * 2**20), gt=0, description="Largest request body.")
    max_prompt_tokens: PositiveInt | None = Field(
        None, description="Most tokens of one prompt; left out, what the context holds."
    )
    max_output_tokens: PositiveInt | None = Field(
        None, description="Most tokens of one choice's reply; left out, what the context holds."
    )
    max_choices: PositiveInt = Field(
        128, description="Most choices of one request, n times its prompts."
    )
    max_stops: int = Field(16, ge=0, description="Most stop strings, and most stop tokens.")
    max_stop_length: PositiveInt = Field(1024, description="Longest stop string, in characters.")
    max_logit_biases: int = Field(1024, ge=0, description="Most tokens in a logit_bias.")
    client_timeout: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a client has to send a request, and to go on reading a reply.",
    )
    api_key: SecretStr | None = Field(
        None, description="Key that clients must send; better set as MALORA_API_KEY, unseen by ps."
    )
    api_keys_file: FilePath | None = Field(
        None, description="File of keys that clients may send, one a line; # begins a comment."
    )
    admin_key: SecretStr | None = Field(
        None,
        description="Key that may also change adapters; better set as MALORA_ADMIN_KEY. With API "
        "keys and without an admin key, nobody may.",
    )
    admin_key_file: FilePath | None = Field(
        None, description="File of the admin key, or of several, one a line."
    )
    tool_call_parser: Literal["hermes", "llama3_json"] = Field(
        "hermes",
        description="How the base model writes calls of tools: hermes (Qwen's too) as JSON between "
        "<tool_call> and </tool_call>, llama3_json as JSON alone.",
    )
    max_logprobs: int = Field(
        20, ge=0, description="Most alternatives a request may ask for beside each token."
    )
    shutdown_timeout: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that requests in flight have to finish after SIGTERM.",
    )
    otlp_endpoint: HttpUrl | None = Field(
        None,
        description="OpenTelemetry collector that traces go to, such as http://127.0.0.1:4318.",
    )
    max_metric_models: int = Field(
        100,
        ge=0,
        description="Most adapters that have metrics of their own; further ones share 'other'.",
    )
    restart: bool = Field(
        True,
        description="Start the engine again where it fails; without it, the server ends then.",
    )
    engine_timeout: float = Field(
        300.0,
        ge=2,
        allow_inf_nan=False,
        description="Seconds that one step of the engine may take; after these it counts as hung, "
        "and is killed.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines to write."
    )
    num_threads: PositiveInt | None = Field(
        None,
        description="Threads for work on the CPU; left out, one for each core, or one with a GPU.",
    )

    def api_keys(self) -> set[str]:
        """All keys that clients may send; none: everybody may. StartError for one that is bad."""
        return _keys(self.api_key, "--api-key (or MALORA_API_KEY)", self.api_keys_file)

    def admin_keys(self) -> set[str]:
        """All keys that may change adapters. StartError for one that is bad, or an API key too."""
        keys = _keys(self.admin_key, "--admin-key (or MALORA_ADMIN_KEY)", self.admin_key_file)
        if keys & self.api_keys():
            raise StartError("an admin key is among the API keys, whose owners would be admins")
        return keys

    @property
    def base_name(self) -> str:
        """The name requests give the base model."""
        if self.served_model_name is not None:
            return self.served_model_name
        if "base" not in self.model_fields_set:
            return EMBEDDED_BASE_NAME
        return Path(self.base).name or Path(self.base).resolve().name


def _keys(secret: SecretStr | None, name: str, file: Path | None) -> set[str]:
    keys = set()
    if secret is not None:
        keys.add(_key(secret.get_secret_value(), name))
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise StartError(f"can't read {file}: {reason}") from None
        from_file = set()
        for number, line in enumerate(lines, 1):
            text = line.split("#", 1)[0].strip()
            if text:
                from_file.add(_key(text, f"{file}, line {number}"))
        if not from_file:  # a file that was meant to close the server must not leave it open
            raise StartError(f"{file} holds no key")
        keys |= from_file
    return keys


def _key(text: str, where: str) -> str:
    """A key that an HTTP header can hold. StartError, which does not show it, for another."""
    if not text or not all("!" <= char <= "~" for char in text):
        raise StartError(f"{where}: a key is one or more visible ASCII characters, without spaces")
    return text


def parse_settings(argv: list[str]) -> Settings:
    """Settings from flags, then `MALORA_` variables, then defaults; StartError on a bad one.

    `--help` prints and raises SystemExit(0).
    """
    try:
        return CliApp.run(Settings, cli_args=argv)
    except ValidationError as error:
        raise StartError(_sentence(error.errors()[0])) from None
    except SettingsError as error:
        raise StartError(str(error).removeprefix("error parsing CLI: ").splitlines()[0]) from None


def _sentence(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    name = field.replace("_", "-")
    if error["type"] == "extra_forbidden":
        return f"--{name} is not a setting; see malora serve --help"
    return f"--{name} (or MALORA_{field.upper()}): {error['msg']}, got {error['input']!r}"
