"""nested/build/saved.py: the config of an earlier run is read as the config that it would be today."""

import copy
import json

import pytest
from helpers import tiny_mdm

from nested.build.options import to_plain
from nested.build.saved import upgrade_saved_config
from nested.runtime.checkpoint import Checkpoints
from nested.weights.fit import shared_levels


def saved_today():
    return json.loads(json.dumps(to_plain(tiny_mdm.get_config("cascade"))))


def saved_earlier():
    """What a version wrote that called the step of a cascade's noise cond_level, and lacked some options of today's."""
    saved = saved_today()
    saved["hierarchy"]["cond_level"] = saved["hierarchy"].pop("cond_noise_step")
    for section, name in (("hierarchy", "noise_resample"), ("evaluate", "memorization")):
        del saved[section][name]
    del saved["search"], saved["evaluate"]["clip"]["weights"], saved["levels"][1]["mixed"]
    return saved


def test_a_config_of_today_stays_as_it_is():
    assert upgrade_saved_config(saved_today()) == saved_today()


def test_an_earlier_config_gets_todays_names_and_defaults():
    earlier = saved_earlier()
    before = copy.deepcopy(earlier)
    assert upgrade_saved_config(earlier) == saved_today()
    assert earlier == before


def test_a_value_of_the_run_is_kept_and_unknown_options_stay():
    saved = saved_today()
    saved["hierarchy"].update(noise_scale="std", of_another_version=1)
    assert upgrade_saved_config(saved)["hierarchy"] == saved["hierarchy"]


def test_an_option_that_had_no_effect_gets_its_default():
    saved = saved_today()
    saved["codec"]["patch"] = 4  # of pixels, which have no patches
    assert upgrade_saved_config(saved) == saved_today()


def test_what_is_no_config_is_refused_in_one_line():
    with pytest.raises(ValueError, match="not the config of a run: it has no levels, only a, b"):
        upgrade_saved_config(dict(a=1, b=2))


def test_checkpoints_of_an_earlier_version_are_compared_as_todays(tmp_path):
    compare = ("hierarchy", "levels", "seed")
    opened = Checkpoints(tmp_path, saved_today(), compare, keep=1, save_every=1, upgrade=upgrade_saved_config)
    opened._check_config(3, saved_earlier())
    other = saved_earlier()
    other["hierarchy"]["cond_level"] = 5
    with pytest.raises(ValueError, match="hierarchy.cond_noise_step: checkpoint 5, config 100"):
        opened._check_config(3, other)
    opened.close()


def test_levels_of_an_earlier_run_fit():
    assert shared_levels(upgrade_saved_config(saved_earlier()), saved_today()) == ("x2", "x4")
