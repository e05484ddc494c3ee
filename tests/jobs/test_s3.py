"""Adapters out of an S3-compatible object store, with moto's server as the store."""

import builtins
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from server.errors import InvalidRequestError
from tests.jobs.conftest import Shop

BUCKET = "adapters"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the store, which holds one bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    return client


def put(client: Any, folder: Path, prefix: str) -> None:
    for path in folder.rglob("adapter_*"):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def error(shop: Shop, url: str) -> str:
    return str(shop.run("import", name="x", url=url).record.error.get("code"))


def test_an_adapter_is_fetched_from_below_the_root(shop: Shop, store: Any) -> None:
    put(store, shop.folders["dora"], "public/dora")
    result = shop.result("import", name="fetched", url=f"s3://{BUCKET}/public/dora")
    record = shop.store.get("fetched")
    assert record.digest == shop.store.get("dora").digest
    assert set(result["etags"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert record.source["result"]["etags"] == result["etags"]
    assert shop.result("import", name="fetched", url=f"s3://{BUCKET}/public/dora/")["adapter"]["generation"] == 1


def test_the_adapter_before_its_training_comes_along(shop: Shop, store: Any) -> None:
    put(store, shop.folders["rank4"], "public/trained")
    put(store, shop.folders["rank4"], "public/trained/initial")
    result = shop.result("import", name="converted", url=f"s3://{BUCKET}/public/trained")
    assert result["similarity"] == pytest.approx(1)
    assert shop.store.get("converted").details["rank"] == 8
    assert {group["outcome"] for group in shop.store.get("converted").details["report"]} == {"converted"}


def test_what_is_not_there_or_not_taken(shop: Shop, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(shop, f"s3://{BUCKET}/public/nothing") == "source_not_found"
    store.put_object(Bucket=BUCKET, Key="public/pickled/adapter_model.bin", Body=b"\x80\x02")
    assert error(shop, f"s3://{BUCKET}/public/pickled") == "adapter_pickle"
    put(store, shop.folders["rank4"], "public/large")
    store.put_object(Bucket=BUCKET, Key="public/large/adapter_model.safetensors", Body=b"x" * (2 << 20))
    assert error(shop, f"s3://{BUCKET}/public/large") == "too_large"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert error(shop, f"s3://{BUCKET}/public/dora") == "source_unavailable"


@pytest.mark.parametrize(
    "url",
    [
        "s3://adapters/private",
        "s3://adapters/publicity",
        "s3://adapters",
        "s3://others/public",
        "s3://adapters/public/../x",
    ],
)
def test_addresses_that_leave_the_root(shop: Shop, url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        shop.run("import", name="x", url=url)
    assert caught.value.code == "path_forbidden"


@pytest.mark.parametrize("url", ["http://host/x", "s3://", "s3://a_b/c", "s3://adapters/\n", "s3://UPPER/x"])
def test_what_is_no_address(shop: Shop, url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        shop.run("import", name="x", url=url)


def test_without_boto3_the_extra_is_named(shop: Shop, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("boto"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    record = shop.run("import", name="x", url=f"s3://{BUCKET}/public/dora").record
    assert record.error["code"] == "not_supported"
    assert "loramux[s3]" in record.error["message"]
