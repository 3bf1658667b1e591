"""Whatever the environment holds, it is a frozen object with a fingerprint, or is refused in words fit for a log."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from job.backbone_table import BACKBONES
from job.errors import ConfigError
from job.settings.environment import fingerprint, load, log_format, variables
from tests.fuzz.inputs import texts, values, written
from tests.support.bounds import ends_within

NAMES = [variable.name for variable in variables()]
# what the operating system gives for bytes that are no UTF-8, and never NUL
odd_texts = st.one_of(texts, st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape")))
NUMBERS = "0 1 2 3 32 0.5 1.0 1e3 1e308 1e400 1e-400 -1 +1 1. .5 1_000 0x10 ٣ nan inf -0"
WORDS = """true no auto on off float32 adam flip scratch fine_tune frozen all imagenet train[:20%] train train[80%:90%]
    cats_vs_dogs:4.0.1 a/b gs://bucket gs://bucket/p gs:/b gs://u:p@bucket/x?a=b#c https://h/x?X-Goog-Signature=s s3://b
    file:///x host:1 [::1]:2 , ,, 1,2 0.5,1 1,1.0"""
REPEATED = ("a", "?", "://", "gs://", "@", "=", "?=", ",", "[", "1,", '{"a":', "é", "x/", "-", "a.", "0", "\udcff")
small_numbers = st.sampled_from(NUMBERS.split())
large_numbers = st.integers(1, 6000).map(lambda digits: "9" * digits)
words = st.sampled_from((*WORDS.split(), "0" * 64, "F" * 64, *BACKBONES))
# Linux takes 128 KiB for a variable
huge = st.builds(lambda part, times: part * times, st.sampled_from(REPEATED), st.sampled_from((300, 5000, 25_000)))
addresses = st.lists(
    st.one_of(st.sampled_from(("a:1", "b:2", "[::1]:3", "c:99999", "d", "e:0")), odd_texts), max_size=3
)
tasks = st.one_of(values, st.fixed_dictionaries({"type": st.sampled_from(("chief", "worker", "ps")), "index": values}))
clusters = st.one_of(
    values, st.dictionaries(st.sampled_from(("chief", "worker", "ps", "evaluator")), addresses, max_size=3)
)
configs = st.fixed_dictionaries({}, optional={"cluster": clusters, "task": tasks, "environment": values})
tf_configs = st.one_of(configs, values).map(lambda value: written(value).decode("utf-8", "surrogateescape"))
lists = st.lists(st.one_of(words, small_numbers), max_size=4).map(",".join)
contents = st.one_of(words, small_numbers, lists, large_numbers, odd_texts, tf_configs, huge).map(
    lambda value: value.replace("\0", "")
)
unknown = st.one_of(
    st.sampled_from(NAMES).map(lambda name: name[:-1]),
    st.sampled_from(NAMES).map(str.lower),
    st.one_of(odd_texts, huge).map(lambda text: "TRANSFER_" + text.replace("\0", "").replace("=", "")),
    odd_texts.map(lambda text: text.replace("\0", "").replace("=", "") or "x"),
)


@given(
    environment=st.dictionaries(st.sampled_from(NAMES), contents, max_size=6),
    others=st.dictionaries(unknown, contents, max_size=1),
    config=st.one_of(st.none(), tf_configs),
)
def test_any_environment(environment: dict[str, str], others: dict[str, str], config: str | None) -> None:
    environment = environment | others | ({"TF_CONFIG": config.replace("\0", "")} if config is not None else {})
    with ends_within(120):
        assert log_format(environment) in ("auto", "text", "json")
        try:
            settings = load(environment)
        except ConfigError as error:
            refused = error
        else:
            json.dumps(settings.resolved(), allow_nan=False)
            assert len(fingerprint(settings.deciding())) == 64
            assert settings.workers >= 1
            return
    assert refused.problems
    for problem in refused.problems:
        assert len(problem.variable) <= 80
        assert str(problem).isprintable()
        assert len(problem.message) < 2000
