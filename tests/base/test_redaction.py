"""No secret survives `redacted`, and nothing else is lost by it."""

import pytest

from jit_accel.base.console import redacted

HF = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://user:pw@host/x?token=abc&size=3", "https://***@host/x?***"),
        ("https://ghp_abc@github.com/me/repo.git", "https://***@github.com/me/repo.git"),
        ("s3://key:secret@bucket/a/b.tar", "s3://***@bucket/a/b.tar"),
        ("https://u:p@ss@host:8080/x", "https://***@host:8080/x"),
        (
            "read https://a.org/1.tar?sig=xyz, then 'https://me:pw@b.org/2.tar'",
            "read https://a.org/1.tar?*** then 'https://***@b.org/2.tar'",
        ),
        ("HTTPS://U:P@HOST/", "HTTPS://***@HOST/"),
        ("https:/me:pw@host/x?sig=1", "https:/***@host/x?***"),
        ("--wandb_api_key=0123456789abcdef", "--wandb_api_key=***"),
        ("--wandb_api_key 0123456789abcdef", "--wandb_api_key ***"),
        ("WANDB_API_KEY='0123abc' python", "WANDB_API_KEY='***' python"),
        ('{"password": "hunter2", "size": 3}', '{"password": "***", "size": 3}'),
        ("ghp_" + "a1B2" * 9, "***"),
        ("key AKIAIOSFODNN7EXAMPLE, Authorization: Bearer abc.def.ghi", "key ***, Authorization: Bearer ***"),
        ("api key " + "0123456789" * 4, "api key ***"),
        (f"logged in with {HF}.", "logged in with ***."),
        (f"HF_TOKEN={HF}", "HF_TOKEN=***"),
    ],
)
def test_secrets_are_replaced(text, safe):
    assert redacted(text) == safe
    assert redacted(safe) == safe


@pytest.mark.parametrize(
    "text",
    [
        "./data/train",
        "builtin:fashion_mnist",
        "owner/name:config@revision",
        "s3://bucket/shards/shard-{000..009}.tar",
        "hf://datasets/owner/name@main/train.parquet",
        "https://host:8080/shard-000.tar#top",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "64 tokens of 16 x 16 pixels; a token is a patch",
        "tokens 64, secret 7, tokens: 64 per image, tokens=256, token=256",
        "the secret: the model is small",
        "mail me@host about https://host/x",
    ],
)
def test_the_rest_stays(text):
    assert redacted(text) == text
