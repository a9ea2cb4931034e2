"""Settings: every way in which a property arrives, and every way in which it is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from whorl.config import (
    PROPERTIES,
    Settings,
    SettingsError,
    id_of,
    properties_from_environment,
    properties_from_json,
    properties_from_xml,
)

_NEW = '<property name="{name}" value="{value}"/>'
_OLD = "<property><name>{name}</name><value>{value}</value></property>"
_WHOLE = """<?xml version="1.0" encoding="UTF-8"?>
<configuration><version>2</version>
  <readers><reader><slot>1008</slot></reader></readers>
  <stream>
    <gadget><name>other</name><property name="gain" value="3"/></gadget>
    <external><execute name="whorl.gadget" target="reconstruct" type="python"/>
      <configuration>{}</configuration></external>
  </stream>
</configuration>"""


@pytest.mark.parametrize("form", [_NEW, _OLD], ids=["attributes", "children"])
@pytest.mark.parametrize("whole", [_WHOLE, "<configuration>{}</configuration>"], ids=["chain", "bare"])
def test_xml(form: str, whole: str) -> None:
    text = whole.format(
        form.format(name="method", value="lowrank") + form.format(name="deadline_s", value="7.5")
    )
    for raw in (text, text.encode(), text.encode() + b"\0", text + "\n"):
        settings = Settings.from_properties(properties_from_xml(raw))
        assert (settings.method, settings.deadline_s) == ("lowrank", 7.5)


def test_json_values_may_be_texts_or_numbers() -> None:
    parameters = {"deadline_s": "12", "iterations": 60.0, "hidden": "32.0", "seed": 3, "method": "LOWRANK"}
    for tail in ("", "\0", "\n\0"):
        text = json.dumps({"version": "1.1.0", "parameters": parameters}) + tail
        for raw in (text, text.encode()):
            settings = Settings.from_properties(properties_from_json(raw))
            assert settings.deadline_s == 12
            assert (settings.iterations, settings.hidden, settings.seed) == (60, 32, 3)
            assert settings.method == "lowrank"
            assert all(isinstance(n, int) for n in (settings.iterations, settings.hidden))
    assert properties_from_json('{"version": "1.1.0"}') == {}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("iterations", True, 'property "iterations" is "True": expected a whole number'),
        ("iterations", "True", 'property "iterations" is "True": expected a whole number'),
        ("iterations", 1.5, 'property "iterations" is "1.5": expected a whole number'),
        ("iterations", float("inf"), 'property "iterations" is "inf": expected a whole number'),
        ("iterations", -2, 'property "iterations" is "-2": expected -1 to 100000'),
        ("deadline_s", "soon", 'property "deadline_s" is "soon": expected a number'),
        ("deadline_s", "", 'property "deadline_s" is "": expected a number'),
        ("deadline_s", "nan", 'property "deadline_s" is "nan": expected a finite number'),
        ("deadline_s", "1e999", 'property "deadline_s" is "1e999": expected a finite number'),
        ("deadline_s", -0.1, 'property "deadline_s" is "-0.1": expected at least 0'),
        ("min_readouts", 1.01, 'property "min_readouts" is "1.01": expected 0.05 to 1'),
        ("seed", 2**63, "expected 0 to 9.22337e+18"),
        ("method", "llrr", 'property "method" is "llrr": expected one of inr, '),
        ("sequence", None, 'property "sequence" is None: expected a text or a number'),
        ("sequence", ["a"], "expected a text or a number"),
        ("method", {}, "expected a text or a number"),
    ],
)
def test_a_value_that_cannot_be_used(name: str, value: object, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_properties({name: value})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("n_coefs", "n_coefficients"),
        ("Method", "method"),
        ("deadline", "deadline_s"),
        ("trajectory_unit", "trajectory_units"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(SettingsError, match=f'unknown property "{wrong}", did you mean "{right}"'):
        Settings.from_properties({wrong: "1"})


def test_an_unknown_name_without_a_near_one_lists_all() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_properties({"xyzzy42": "1"})
    assert all(f.name in str(caught.value) for f in fields(Settings))


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"t1_min_ms": 300, "t1_max_ms": 300}, "t1_min_ms is 300, t1_max_ms is 300"),
        ({"t2_min_ms": 30, "t2_max_ms": 20}, "t2_min_ms is 30, t2_max_ms is 20"),
        ({"t2_min_ms": 80, "t1_max_ms": 50}, "t2_min_ms is 80, t1_max_ms is 50"),
        ({"base_resolution": 64, "finest_resolution": 32}, "base_resolution is 64"),
        # Clipped maps would be wrong maps.
        ({"t2_max_ms": 3300}, "uint16 pixels hold up to 3276.7 ms"),
        ({"t1_max_ms": 40000}, "uint16 pixels hold up to 32767 ms"),
    ],
)
def test_values_that_contradict_each_other(properties: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_properties(properties)
    assert says in str(caught.value)


def test_long_times_are_fine_as_floats() -> None:
    settings = Settings.from_properties({"t2_max_ms": 4000, "t1_max_ms": 40000, "output_dtype": "float32"})
    assert (settings.t2_max_ms, settings.t1_max_ms) == (4000, 40000)


def test_files_are_not_named_over_a_network() -> None:
    with pytest.raises(SettingsError, match="not taken from the network"):
        Settings.from_properties({"sequence": "/etc/passwd"}, local=False)
    assert Settings.from_properties({"sequence": ""}, local=False).sequence == ""
    assert Settings.from_properties({"sequence": "train.csv"}).sequence == "train.csv"


@pytest.mark.parametrize(
    "text",
    [
        b'<!DOCTYPE a [<!ENTITY b "c">]><configuration/>',
        b'<?xml version="1.0"?>\n<!DOCTYPE configuration SYSTEM "file:///etc/passwd"><configuration/>',
        b"\xfe\xff" + '<!DOCTYPE a [<!ENTITY b "c">]><configuration/>'.encode("utf-16-be"),
        "<!DOCTYPE a><configuration/>".encode("utf-16"),
        b"<configuration>",
        b"no xml",
        b'<?xml version="1.0" encoding="nonsense"?><configuration/>',
        b'<configuration><property name="method"/></configuration>',
        b'<configuration><property value="method"/></configuration>',
    ],
    ids=["entity", "doctype", "utf-16-be", "utf-16-le", "open", "text", "encoding", "no value", "no name"],
)
def test_xml_that_is_refused(text: bytes) -> None:
    with pytest.raises(SettingsError):
        properties_from_xml(text)


def test_an_empty_configuration_has_no_properties() -> None:
    assert properties_from_xml(b"") == properties_from_xml(b"\0") == properties_from_xml("\n ") == {}
    assert properties_from_xml("<configuration/>") == {}


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", '"text"', '{"parameters": []}', '{"parameters": "x"}', "[" * 100_000, b"\xff{"],
    ids=["empty", "text", "list", "string", "list inside", "string inside", "deep", "bytes"],
)
def test_json_that_is_refused(text: str | bytes) -> None:
    with pytest.raises(SettingsError):
        properties_from_json(text)


def test_each_choice_can_be_made_in_any_case() -> None:
    for name, known in PROPERTIES.items():
        for choice in known.choices:
            assert getattr(Settings.from_properties({name: f" {choice.upper()} "}), name) == choice
    # A keyboard without the sign.
    assert Settings.from_properties({"trajectory_units": "+-1"}).trajectory_units == "±1"


def test_the_digest_tells_settings_apart() -> None:
    changed: dict[str, object] = {"method": "lowrank", "seed": 1, "deadline_s": 1, "t1_max_ms": 4999}
    digests = {Settings.from_properties({name: value}).digest() for name, value in changed.items()}
    digests.add(Settings().digest())
    assert len(digests) == len(changed) + 1
    assert Settings.from_properties({"seed": "0"}).digest() == Settings().digest()


def test_all_are_described() -> None:
    assert list(PROPERTIES) == [f.name for f in fields(Settings)]
    assert all(len(known.text) >= 10 for known in PROPERTIES.values())


def test_each_group_is_one_block() -> None:
    groups = [known.group for known in PROPERTIES.values()]
    starts = [group for before, group in zip([None, *groups], groups, strict=False) if group != before]
    assert len(starts) == len(set(starts)) > 1
    assert all(starts)


#: Units that stand in a name as its end, the longest end first: um2_per_ms ends with ms too.
_ENDS = {
    "_um2_per_ms": "µm²/ms",
    "_cycles_per_mm": "cycles/mm",
    "_deg": "deg",
    "_mm": "mm",
    "_ms": "ms",
    "_us": "µs",
    "_mb": "MiB",
    "_s": "s",
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_unit_is_that_of_the_name(name: str) -> None:
    found = next((unit for end, unit in _ENDS.items() if name.endswith(end)), None)
    if found is None:  # then it is none of those that a name says
        assert PROPERTIES[name].unit not in _ENDS.values()
    else:
        assert PROPERTIES[name].unit == found


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (None, None, ""),
        (0.5, None, "at least 0.5"),
        (None, 3, "at most 3"),
        (-1, 100000, "-1 to 100000"),
    ],
)
def test_a_range_in_words(low: float | None, high: float | None, says: str) -> None:
    assert replace(PROPERTIES["ridge"], low=low, high=high).bounds == says


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"slice_profile": "gauss"}, '"slice_profile" is "gauss": expected none, sinc, or up to 256'),
        ({"slice_profile": "0 0"}, "expected none, sinc"),
        ({"slice_profile": "1 nan"}, "expected none, sinc"),
        ({"slice_profile": ""}, "expected none, sinc"),
        ({"slice_profile": "sinc", "rf_shape": "pulse.txt"}, "expected one of them"),
        ({"diffusion_um2_per_ms": 2}, "expected both or neither"),
        ({"spoiler_cycles_per_mm": 2}, "expected both or neither"),
        ({"b1_min": 1.2, "b1_max": 0.8}, "expected min < max"),
        ({"b1_map": "b1.npy", "b1": "match"}, "expected one of them"),
        ({"inversion_efficiency": 1.2}, "expected 0 to 1"),
        ({"refine": "maybe"}, "expected one of on, off"),
        ({"cache_mb": -1}, "expected at least 0"),
        ({"inversion_time_ms": -0.5}, "expected 0 or more, or -1"),
    ],
)
def test_signal_models_that_cannot_be(properties: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_properties(properties)


@pytest.mark.parametrize(
    ("text", "factors"),
    [("none", ()), (" SINC ", ()), ("1 0.97 0.5", (1, 0.97, 0.5)), ("1, .5,-0.1", (1, 0.5, -0.1))],
)
def test_a_slice_profile_may_be_a_list(text: str, factors: tuple[float, ...]) -> None:
    assert Settings.from_properties({"slice_profile": text}).flip_factors() == factors


def test_the_digest_knows_what_changes_maps() -> None:
    plain = Settings.from_properties({}).digest()
    assert Settings.from_properties({"cache_dir": "/elsewhere", "cache_mb": 7}).digest() == plain
    assert Settings.from_properties({"refine": "off"}).digest() != plain


@pytest.mark.parametrize("name", ["sequence", "rf_shape", "b1_map", "cache_dir"])
def test_no_file_is_taken_from_the_network(name: str) -> None:
    with pytest.raises(
        SettingsError, match="concerns the machine that reconstructs and is not taken from the network"
    ):
        Settings.from_properties({name: "/etc/passwd"}, local=False)
    with pytest.raises(SettingsError, match="not taken from the network"):
        Settings.from_properties({"cache_mb": 1}, local=False)


# --- Presets ---------------------------------------------------------------------------------------------

#: What preset=seed stands for.
_PUBLISHED = {"start": "adjoint", "guide": "off", "head": "image", "fit": "adam"}


def test_the_preset_seed_is_the_data_flow_as_published() -> None:
    settings = Settings.from_properties({"preset": "seed"})
    assert {name: getattr(settings, name) for name in _PUBLISHED} == _PUBLISHED
    plain = Settings.from_properties({})
    others = [f.name for f in fields(Settings) if f.name not in ("preset", *_PUBLISHED)]
    assert all(getattr(settings, name) == getattr(plain, name) for name in others)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", "corrected"),
        ("guide", "on"),
        ("head", "kspace"),
        ("fit", "varpro"),
        ("fit", " VarPro "),
    ],
)
def test_what_is_set_by_itself_wins_over_the_preset(name: str, value: str) -> None:
    for properties in ({"preset": "SEED", name: value}, {name: value, "preset": "seed"}):
        settings = Settings.from_properties(properties)
        assert getattr(settings, name) == value.strip().lower()
        assert all(getattr(settings, n) == v for n, v in _PUBLISHED.items() if n != name)


@pytest.mark.parametrize("properties", [{}, {"preset": "default"}, {"preset": " Default "}])
def test_the_default_preset_leaves_the_data_flow_as_it_is(properties: dict[str, object]) -> None:
    settings = Settings.from_properties(properties)
    assert settings == Settings()
    found = (settings.start, settings.guide, settings.head, settings.fit)
    assert found == ("corrected", "on", "kspace", "varpro")
    # What the order of the interleaves, the guide, the encoder or the fit decides.
    assert settings.correction_steps == settings.iterations == -1
    assert settings.levels == settings.hidden == settings.finest_resolution == 0
    assert settings.learning_rate == 0


@pytest.mark.parametrize("encoder", ["hash", "fourier", "siren"])
def test_other_encoders_than_grids_have_no_guide(encoder: str) -> None:
    assert Settings.from_properties({"encoder": encoder}).guide == "off"
    with pytest.raises(SettingsError, match=f'encoder is "{encoder}" and guide is on.* Expected guide=off'):
        Settings.from_properties({"encoder": encoder, "guide": "on"})


@pytest.mark.parametrize("name", ["normal", "tuning_budget_s", "head_steps"])
def test_what_acts_no_more_is_no_property(name: str) -> None:
    with pytest.raises(SettingsError, match=f'unknown property "{name}"'):
        Settings.from_properties({name: 0})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("preset", "high", "expected one of default, seed"),
        ("guide", "of", "expected one of on, off"),
        ("coil_maps", "polynom", "expected one of polynomial, walsh, espirit"),
        ("head", "kspac", "expected one of kspace, image"),
        ("encoder", "fft", "expected one of grid, hash, fourier, siren"),
        ("correction_steps", -2, "expected -1 to 100"),
        ("finest_resolution", -1, "expected at least 0"),
        ("learning_rate", -0.1, "expected at least 0"),
        ("iterations", 100001, "expected -1 to 100000"),
        ("levels", 33, "expected 0 to 32"),
        ("hidden", -1, "expected 0 to 1024"),
        ("llr_lambda", -0.1, "expected 0 to 1000"),
        ("llr_block", 1, "expected 2 to 64"),
        ("llr_iterations", 0, "expected 1 to 1000"),
        ("log2_table", 25, "expected 4 to 24"),
        ("sine_layers", 0, "expected 1 to 16"),
    ],
)
def test_settings_of_the_methods_have_their_range(name: str, value: object, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_properties({name: value})


def test_a_finest_resolution_of_zero_contradicts_no_base() -> None:
    assert Settings.from_properties({"base_resolution": 64}).finest_resolution == 0


# --- True or false -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1, "true", "True", " TRUE ", "1", "yes", "On"])
def test_true_in_each_way(value: object) -> None:
    assert Settings.from_properties({"error_image": value}).error_image is True


@pytest.mark.parametrize("value", [False, 0, "false", "False", "0", "NO", "off"])
def test_false_in_each_way(value: object) -> None:
    assert Settings.from_properties({"error_image": value}).error_image is False


def test_true_and_false_from_xml_and_json() -> None:
    xml = '<configuration><property name="error_image" value="true"/></configuration>'
    assert Settings.from_properties(properties_from_xml(xml)).error_image is True
    for value in (True, "True"):
        text = json.dumps({"parameters": {"error_image": value}})
        # It names no file, so the network may set it.
        assert Settings.from_properties(properties_from_json(text), local=False).error_image is True


@pytest.mark.parametrize("value", ["", "maybe", 2, -1, "10"])
def test_neither_true_nor_false(value: object) -> None:
    with pytest.raises(SettingsError, match=f'"error_image" is "{value}": expected true or false'):
        Settings.from_properties({"error_image": value})


def test_the_spool_is_the_business_of_whoever_starts_the_program() -> None:
    own: dict[str, object] = {"spool": "/scans", "spool_scans": 3, "spool_mb": "100"}
    settings = Settings.from_properties(own)
    assert (settings.spool, settings.spool_scans, settings.spool_mb) == ("/scans", 3, 100)
    for name, value in own.items():
        with pytest.raises(SettingsError, match=f'property "{name}" .* not taken from the network'):
            Settings.from_properties({name: value}, local=False)
    for name in ("spool_scans", "spool_mb"):
        with pytest.raises(SettingsError, match="expected at least 1"):
            Settings.from_properties({name: 0})
    # None of them changes a map.
    assert Settings.from_properties({**own, "error_image": True}).digest() == Settings().digest()


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"rovir_region": "0.1 0.9 0.2 0.8"}, "compression is svd: expected compression=rovir"),
        ({"compression": "rovir", "rovir_region": "0.1 0.9 0.2"}, "expected x0 x1 y0 y1"),
        ({"compression": "rovir", "rovir_region": "0.9 0.1 0.2 0.8"}, "expected x0 x1 y0 y1"),
        ({"compression": "rovir", "rovir_region": "0 1.1 0.2 0.8"}, "expected x0 x1 y0 y1"),
        ({"compression": "rovir", "rovir_region": "0 nan 0.2 0.8"}, "expected x0 x1 y0 y1"),
        ({"compression": "off", "virtual_coils": 4}, "virtual_coils is 4, compression is off"),
        ({"coil_maps": "espirit", "coil_maps_file": "a.npy"}, "there is a coil_maps_file"),
        ({"coil_maps": "walsh", "coil_maps_file": "a.npy"}, "there is a coil_maps_file"),
    ],
    ids=str,
)
def test_properties_of_the_coils_that_contradict_each_other(properties: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_properties(properties)


def test_a_file_of_coil_maps_alone_contradicts_nothing() -> None:
    assert Settings.from_properties({"coil_maps_file": "a.npy"}).coil_maps_file == "a.npy"


def test_the_region_of_interest() -> None:
    assert Settings().region_of_interest() == (0, 1, 0, 1)
    settings = Settings.from_properties({"compression": "rovir", "rovir_region": "0.1, .9 0.2,1"})
    assert settings.region_of_interest() == (0.1, 0.9, 0.2, 1)


def test_json_names_may_lack_their_underscores() -> None:
    found = properties_from_json(
        '{"parameters": {"scandeadlines": 5, "outputDtype": "float32", "method": "llr"}}'
    )
    assert found == {"scan_deadline_s": 5, "output_dtype": "float32", "method": "llr"}


def test_no_two_properties_have_the_same_id():
    names = [f.name for f in fields(Settings)]
    assert len({id_of(name) for name in names}) == len(names)


def test_the_environment_sets_properties_and_nothing_else():
    found = properties_from_environment(
        {"WHORL_PROPERTY_CACHE_DIR": "/x", "WHORL_PORT": "tcp://1", "PATH": "/"}
    )
    assert found == {"cache_dir": "/x"}


@pytest.mark.parametrize(
    ("properties", "iterates"),
    [
        ({}, False),
        ({"iterations": 1}, True),
        ({"guide": "off"}, True),
        ({"guide": "off", "iterations": 0}, False),
        ({"fit": "adam"}, True),
        ({"preset": "seed"}, True),
        ({"encoder": "hash"}, True),  # which has no guide
        ({"method": "llr", "iterations": 5}, False),
    ],
    ids=str,
)
def test_whether_a_fit_iterates(properties: dict[str, object], iterates: bool) -> None:
    assert Settings.from_properties(properties).iterates == iterates
