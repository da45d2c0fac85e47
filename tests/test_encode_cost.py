"""nested/latents/cost.py: bytes against what encoding writes, the arithmetic of time, and that a plan writes
nothing."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import toy_encoding as toy
from helpers.refusals import refused
from helpers.small_runs import config_of

from input_pipeline import latent_records as records
from nested.build.data import Data
from nested.latents import cost as encode_cost
from nested.latents import passes
from nested.latents.job import plan_job
from nested.modes import encode

COST = encode_cost.Cost(
    images=1_281_167, fitted=131_072, field_bytes={"label": 4, "map": 25_088}, shards=313, free_bytes=10**11,
    processes=2, devices=1, reading=500.0, encoding=100.0,
)  # fmt: skip


def job_of(directory, source=None, **changes):
    return plan_job(source or toy.Source(), toy.Toy(), toy.CONFIG, toy.CODEC, directory, **changes)


@pytest.mark.parametrize("flip", [False, True])
def test_bytes_are_those_that_encoding_writes(tmp_path, flip, capsys):
    job = job_of(tmp_path / "latents", flip=flip)
    cost = encode_cost.report_cost(job, str(tmp_path / "plan.json"))
    assert not job.directory.exists()  # a plan writes nothing there
    assert (cost.images, cost.shards, cost.processes, cost.devices) == (44, 3, 1, 1)
    assert cost.reading > 0 and cost.encoding > 0 and cost.fitted == 0  # raw features of 44 images are kept
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["total_bytes"] == cost.total_bytes and written["field_bytes"] == cost.field_bytes
    said = capsys.readouterr().out
    assert "44 images" in said and f"{sum(cost.field_bytes.values())} bytes per image (label 4" in said
    assert ("each with its mirror image" in said) == flip and "NOT ENOUGH" not in said
    passes.encode(job)
    layout = json.loads(job.index_path.read_text())["fields"]
    assert cost.field_bytes == {entry["name"]: records.Field.from_json(entry).nbytes for entry in layout}
    on_disk = sum(path.stat().st_size for path in job.directory.glob("*.array_record"))
    assert cost.total_bytes < on_disk < cost.total_bytes + 3 * 2**17  # a shard's index and padding


def test_no_more_images_are_read_than_are_timed():
    source = toy.Source()
    encode_cost.measure_cost(job_of("", source))
    assert sorted(set(source.reads)) == list(range(4 * toy.CONFIG.batch_size))


def test_images_of_the_basis_pass_twice_where_they_are_not_kept(monkeypatch):
    config = dataclasses.replace(toy.CONFIG, fit_images=20)
    job = plan_job(toy.Source(), toy.Toy(), config, toy.CODEC, "")
    assert passes.images_seen_twice(job) == 0
    monkeypatch.setattr(passes, "FEATURE_CACHE_BYTES", 1000)
    assert passes.images_seen_twice(job) == 20 == encode_cost.measure_cost(job).fitted
    pixels = plan_job(toy.Source(), None, dataclasses.replace(config, features=()), toy.PIXELS, "")
    assert passes.images_seen_twice(pixels) == 0  # nothing is fitted


def test_time_is_that_of_the_slower_part():
    passes = 1_281_167 + 131_072
    assert COST.seconds(2, 1) == pytest.approx(passes / 200)  # two devices encode
    assert COST.seconds(2, 8) == pytest.approx(passes / 1000)  # two processes read
    assert COST.total_bytes == 1_281_167 * 25_092


def test_the_plan_in_words(tmp_path):
    said = encode_cost.format_cost(job_of(tmp_path), COST)
    assert "25,092 bytes per image (label 4, map 25,088): 32.1 GB in 313 shards; 100 GB are free" in said
    assert "1,281,167 images; 131,072 of them pass twice, for the SVD's basis (encoder.fit_images)" in said
    assert "time:    2.0 hours with 2 process(es) of 1 device(s) each; bottleneck: encoding" in said
    assert said.endswith("time:    23.5 minutes with 2 process(es) of 8 device(s) each; bottleneck: reading")
    short = dataclasses.replace(COST, free_bytes=10**10, devices=8, encoding=0.05)
    said = encode_cost.format_cost(job_of(tmp_path), short)
    assert "10 GB are free" in said and "NOT ENOUGH, choose another config.latents_dir" in said
    assert said.count("time:") == 1 and "20.4 days with 2 process(es)" in said


def test_features_may_have_components_of_their_own(tmp_path):
    config = dataclasses.replace(toy.CONFIG, components=(5, 2))
    job = plan_job(toy.Source(), toy.Toy(), config, toy.CODEC, tmp_path)
    assert job.stored == {"crops1": (1, 1, 5), "map": (4, 4, 2)}
    passes.encode(job)
    toy.run(tmp_path / "five")
    few, all_of_them = toy.batch(tmp_path), toy.batch(tmp_path / "five")
    np.testing.assert_array_equal(few["crops1"], all_of_them["crops1"])
    # a product with fewer columns may sum in another order, which float16 shows in its last digit
    np.testing.assert_allclose(few["map"], all_of_them["map"][..., :2], rtol=1e-3, atol=1e-3)
    for components, message in (
        ((1, 2, 3), "encoder.components: (1, 2, 3) given for 2 features; give one number, or one for each of crops1"),
        ((5, 0), "encoder.components: (5, 0) given; it must be at least 1"),
    ):
        wrong = dataclasses.replace(config, components=components)
        refused(lambda: plan_job(toy.Source(), toy.Toy(), wrong, toy.CODEC, ""), match=message)  # noqa: B023


def test_without_features_of_an_encoder_none_is_asked_for(tmp_path):
    """Its name and weights do not enter what the latents are made from."""
    config = dataclasses.replace(toy.CONFIG, features=("codec2",))
    job = plan_job(toy.Source(), None, config, toy.CODEC, tmp_path)
    passes.encode(job)
    made = json.loads(job.index_path.read_text())["made_from"]
    assert not {"encoder.name", "encoder.weights_sha256", "encoder.input_size"} & made.keys()


def test_a_plan_of_nothing_is_refused(tmp_path):
    config = config_of(2)
    for level in config.levels:
        level.source = "pixels"
    refused(encode.plan_encoding, config, str(tmp_path), "", match="--plan: this config encodes nothing")


def test_stored_text_is_counted(monkeypatch, tmp_path, capsys):
    config = config_of(2)
    config.data.source, config.levels[0].source = "image_folder", "map"
    config.text.update(encoder="minilm", stored=True, max_tokens=10, width=50)
    monkeypatch.setattr(encode_cost, "report_cost", lambda job, out: None)
    monkeypatch.setattr(encode, "encoding_job", lambda data, directory: None)
    captioned = type("Captioned", (), {"captions": ("one", ("two", "three"), "one")})()
    monkeypatch.setattr(Data, "open_images", lambda self: captioned)
    encode.plan_encoding(config, str(tmp_path), "")
    assert capsys.readouterr().out == "text:    3 captions, at most 3 kB of features beside (text.stored)\n"
