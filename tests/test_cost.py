"""Costs against counts that are known exactly, and the stopwatch against calls of known length."""

from __future__ import annotations

import time
from itertools import product

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from distill.cost import latency, macs, parameters, weight_bytes


def bert(
    layers: int, hidden: int, ff: int, heads: int, labels: int = 2, device: str = "meta", **kwargs: object
) -> nn.Module:
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ff,
        num_attention_heads=heads,
        num_labels=labels,
        **kwargs,
    )
    with torch.device(device):
        return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("layers", "hidden", "ff", "heads", "params", "count"),
    [
        (12, 768, 3072, 12, 109_483_778, 11_174_217_216),
        (6, 768, 3072, 12, 66_956_546, 5_587_404_288),
        (4, 312, 1200, 12, 14_350_874, 623_738_544),
        (2, 128, 512, 2, 4_386_178, 58_736_896),
    ],
)
def test_bert_agrees_to_the_integer(layers: int, hidden: int, ff: int, heads: int, params: int, count: int) -> None:
    network = bert(layers, hidden, ff, heads)
    assert parameters(network) == params
    assert weight_bytes(network) == 4 * params
    assert macs(network, input_ids=torch.ones(1, 128, dtype=torch.long, device="meta")) == count


@pytest.mark.parametrize(
    ("name", "params", "count"),
    [
        ("resnet50", 25_557_032, 4_089_184_256),
        ("resnet18", 11_689_512, 1_814_073_344),
        ("mobilenetv3_large_100", 5_483_032, 216_589_760),
        ("mobilenetv3_small_100", 2_542_856, 56_510_400),
    ],
)
def test_cnn_agrees_to_the_integer(name: str, params: int, count: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    assert parameters(network) == params
    assert macs(network, torch.ones(1, 3, 224, 224, device="meta")) == count


@pytest.mark.parametrize(
    ("layers", "size", "length", "batch"), list(product([1, 3], [(32, 48, 2), (48, 96, 4)], [5, 16], [1, 2]))
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_formula_on_the_cpu_with_a_mask(
    layers: int, size: tuple[int, int, int], length: int, batch: int, attention: str
) -> None:
    hidden, ff, heads = size
    labels = 3
    network = bert(layers, hidden, ff, heads, labels, "cpu", vocab_size=50, attn_implementation=attention)
    ids = torch.ones(batch, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    per_layer = 4 * length * hidden**2 + 2 * length * hidden * ff + 2 * length**2 * hidden
    expected = batch * (layers * per_layer + hidden**2 + hidden * labels)
    assert macs(network, input_ids=ids, attention_mask=mask) == expected


def test_macs_leaves_modes_and_statistics_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    network[1].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert macs(network, torch.ones(2, 3, 5, 5)) == 2 * 4 * 3 * 3 * 3 * 3 * 3
    assert [child.training for child in network] == [True, False, True]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_macs_restores_the_modes_after_a_failing_forward() -> None:
    network = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        macs(network, torch.ones(1, 3))
    assert network.training


def test_shared_and_non_persistent_tensors_are_counted_once_or_not_at_all() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    network.register_buffer("kept", torch.zeros(2, dtype=torch.int64))
    network.register_buffer("rebuilt", torch.zeros(1000), persistent=False)
    assert parameters(network) == 9
    assert weight_bytes(network) == 9 * 4 + 2 * 8
    assert weight_bytes(network.half()) == 9 * 2 + 2 * 8


def test_latency_times_single_calls_and_restores_the_threads() -> None:
    durations = iter([0.2] + [0.01] * 8 + [0.05] * 2)
    threads, calls = [], []
    before = torch.get_num_threads()

    def call() -> None:
        threads.append(torch.get_num_threads())
        calls.append(torch.is_grad_enabled())
        time.sleep(next(durations))

    measured = latency(call, batch=4, warmup=1, repeats=10, threads=before + 1)
    assert threads == [before + 1] * 11
    assert not any(calls)
    assert torch.get_num_threads() == before
    assert 10 <= measured.p50_ms < 40
    assert measured.p90_ms >= 50
    assert measured.throughput == pytest.approx(4000 / measured.p50_ms)
    assert measured.report() == {
        "p50": measured.p50_ms,
        "p90": measured.p90_ms,
        "batch": 4,
        "threads": before + 1,
        "device": "cpu",
    }


def test_latency_restores_the_threads_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        latency(lambda: 1 / 0, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}, {"threads": 0}, {"batch": 0}])
def test_latency_rejects_counts_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        latency(lambda: None, **wrong)
