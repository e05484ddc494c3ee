"""Who may import whom."""

import ast
import sys

import pytest

from tests.architecture.source_tree import PACKAGES, Source, sources

# For the modules under a prefix (the longest that fits): packages from outside that they may use, ...
EXTERNAL: dict[str, set[str]] = {
    "lora_core": {"regex", "safetensors", "torch"},
    "loramux_client": {"httpx", "pydantic"},
    "lora_core.ops.adapter_kernels": {"triton"},
    "lora_core.ops.few_rows": {"torch", "triton"},
    "lora_core.ops.four_bit": {"torch", "triton"},
    "lora_core.ops.triton": {"torch", "triton"},
    "lora_core.ops.tuning": {"torch", "triton"},
    "lora_core.quant": {"bitsandbytes", "torch"},
    "lora_core.quant_files": {"bitsandbytes", "torch"},
    "lora_core.quant_product": {"bitsandbytes", "torch"},
    "server.adapters": set(),
    "server.adapters.loader": {"torch"},
    "server.adapters.objects": {"numpy"},
    "server.api": {"fastapi", "pydantic", "starlette"},
    "server.auth": {"pydantic"},
    "server.app": {"fastapi", "torch"},
    "server.cli": {"pydantic", "rich", "typer", "uvicorn"},
    "server.cli.doctor": {"torch", "typer"},
    "server.cli.quantize": {"torch", "typer"},
    "server.demo": {"torch", "transformers"},
    "server.drain": {"uvicorn"},
    "server.delivery": set(),
    "server.durable": set(),
    "server.engine": {"torch", "transformers"},
    "server.engine.attention.kernels": {"torch", "triton"},
    "server.engine.layer_kernels": {"torch", "triton"},
    "server.allocator": set(),
    "server.engine.blocks": set(),
    "server.engine.fairness": set(),
    "server.engine.ports": set(),
    "server.engine.request": set(),
    "server.engine.scheduler": set(),
    "server.errors": set(),
    "server.generation": set(),
    "server.failpoints": set(),
    "server.gguf": {"gguf", "tokenizers", "torch", "transformers"},
    "server.jobs": set(),
    "server.jobs.worker": {"torch"},
    "server.jobs.tasks": {"huggingface_hub", "safetensors", "torch", "transformers"},
    "server.jobs.tasks.s3": {"boto3", "botocore"},
    "server.leases": set(),
    "server.loading": set(),
    "server.memory": set(),
    "server.metrics": {"prometheus_client"},
    "server.schemas": {"pydantic"},
    "server.settings": {"pydantic"},
    "server.structured": {"llguidance", "numpy"},
    "server.tenancy": set(),
    "server.tenant_jobs": set(),
    "server.text": {"jinja2", "llguidance", "tokenizers", "transformers"},
}
# ... and parts of the project that they may not know.
FORBIDDEN: dict[str, set[str]] = {
    "lora_core": {"server", "loramux_client"},
    "loramux_client": {"server", "lora_core"},
    "server.adapters": {
        "server.api",
        "server.app",
        "server.delivery",
        "server.engine",
        "server.generation",
        "server.schemas",
    },
    "server.auth": {"server.adapters", "server.api", "server.app", "server.engine", "server.generation"},
    "server.engine": {
        "server.adapters",
        "server.api",
        "server.app",
        "server.delivery",
        "server.generation",
        "server.schemas",
    },
    "server.jobs": {"server.api", "server.app", "server.engine", "server.generation", "server.schemas"},
    "server.schemas": {"server.api", "server.app"},
    "server.api": {"server.app"},
}
SETTINGS_READERS = {"server.app", "server.cli.doctor", "server.cli.serve", "server.settings"}


def _rule(table: dict[str, set[str]], module: str) -> set[str] | None:
    fitting = [prefix for prefix in table if module == prefix or module.startswith(prefix + ".")]
    return table[max(fitting, key=len)] if fitting else None


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.module)
def test_imports(source: Source) -> None:
    allowed = _rule(EXTERNAL, source.module) or set()
    forbidden = _rule(FORBIDDEN, source.module) or set()
    for name in source.imports():
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top not in PACKAGES:
            assert top in allowed, f"{source.module} imports {name}"
        assert not any(name == part or name.startswith(part + ".") for part in forbidden), (
            f"{source.module} imports {name}"
        )
        if name.startswith("server.settings"):
            assert source.module in SETTINGS_READERS, f"{source.module} reads settings"


def test_nothing_runs_strangers_code() -> None:
    """No pickle, eval, or code from a model's folder anywhere."""
    unsafe_modules = {"pickle", "marshal", "shelve", "yaml", "cloudpickle"}
    unsafe_calls = {"eval", "exec", "torch.load"}
    for source in sources():
        assert not {name.partition(".")[0] for name in source.imports()} & unsafe_modules, source.module
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in unsafe_calls, (source.module, node.lineno)
                assert not [k for k in node.keywords if k.arg == "trust_remote_code"], (source.module, node.lineno)


def test_jobs_import_transformers_only_where_they_need_it() -> None:
    """It takes seconds, and an upload waits for the process that converts it."""
    for source in sources():
        if source.module.startswith("server.jobs."):
            assert not {name for name in source.imports_at_start() if name.startswith("transformers")}, source.module
