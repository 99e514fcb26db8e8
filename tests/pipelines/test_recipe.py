import pytest
import yaml

from pipelines.curate import CurateRecipe, build_stages
from pipelines.preflight import named_sources
from pipelines.recipe import differences, dump_recipe, load_recipe
from training.config import ConfigError

FINALS = (
    [14_197_086, 56_788_344, 40_997_344] + [1_000_000] * 13 + [1_434_262] + [1_000_000] * 3
    + [1_580_470, 6_321_880, 960_000, 830_000] + [1_000_000] * 3
)  # fmt: skip


@pytest.mark.parametrize("name", ["smoke", "lvd1m", "lvd142m"])
def test_recipes_resolve_and_run_again_as_they_are(name, tmp_path):
    recipe = load_recipe(CurateRecipe, name)
    assert recipe.name == name
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_recipe(recipe))
    again = load_recipe(CurateRecipe, str(saved))
    assert again == recipe
    assert len(build_stages(load_recipe(CurateRecipe, "smoke"))) == 37


def test_a_balanced_set_runs_again_as_it_resolves(tmp_path):
    recipe = load_recipe(CurateRecipe, "smoke", ["queries.even={mode: balanced, total: 9}"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_recipe(recipe))
    assert load_recipe(CurateRecipe, str(saved)) == recipe
    assert [name for name, _, _ in named_sources(recipe)] == ["benchmark", "as_is", "sample", "cluster", "web"]


def test_the_papers_recipe_names_the_27_rows_of_its_table():
    recipe = load_recipe(CurateRecipe, "lvd142m")
    assert len(recipe.queries) == 27
    assert sum(FINALS) == 142_109_386
    assert [query.mode for query in recipe.queries.values()].count("cluster") == 21
    assert {query.k for query in recipe.queries.values() if query.mode == "sample"} == {4, 32}
    clusters = [query for query in recipe.queries.values() if query.mode == "cluster"]
    assert {(q.min_queries, q.per_cluster, q.cap) for q in clusters} == {(3, 10_000, 1_000_000)}
    assert (recipe.descriptor.duplicate_threshold, recipe.descriptor.leakage_threshold) == (0.6, 0.45)
    assert recipe.cluster.num_clusters == 100_000
    assert recipe.select.multiset  # the total counts collisions


def test_the_smoke_recipe_differs_from_the_papers_in_models_and_sizes_only():
    keys = {key for key, _, _ in differences(*(load_recipe(CurateRecipe, name) for name in ("smoke", "lvd142m")))}
    assert keys <= {
        "shard_rows", "screen.blocked_hosts", "look.yunet", "look.face_input_px", "cluster.sample", "fetch.max_bytes",
        "fetch.timeout_s", "descriptor.name",
        "descriptor.duplicate_threshold", "descriptor.leakage_threshold", "edges.num_lists", "edges.fit_pictures",
        "edges.fit_shards", "edges.probes", "edges.reference_probes", "embed.name", "cluster.num_clusters",
        "select.multiset",  # of a small pool every picture would be there many times
        "export.samples_per_tar",
    }  # fmt: skip


@pytest.mark.parametrize(("overrides", "gpus"), [([], 1), (["look.face_input_px=[]"], 0), (["look.detector=none"], 0)])
def test_look_holds_a_gpu_only_where_nudenet_seeks_faces(overrides, gpus):
    stages = build_stages(load_recipe(CurateRecipe, "smoke", ["execution.device=cuda", *overrides]))
    held = {stage.name: stage.resources.gpus for stage in stages}
    assert held["look"] == gpus
    assert held["embed"] == 1


def test_what_an_estimate_counts_on_makes_nothing_stale():
    plain = load_recipe(CurateRecipe, "smoke")
    counted = load_recipe(
        CurateRecipe, "smoke", ["sources.web.expected_rows=9", "queries.sample.expected_rows=9", "expected.near=0.5"]
    )
    for stage, other in zip(build_stages(plain), build_stages(counted), strict=True):
        assert stage.fingerprint_values() == other.fingerprint_values()
    assert differences(plain, counted) == []


def test_a_base_lies_beneath_and_overrides_on_top(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: smoke\nname: mine\nsafety: {max_aspect: 5}\n")
    recipe = load_recipe(CurateRecipe, str(mine), ["safety.min_shortest_px=99", "queries.sample.k=2"])
    assert (recipe.name, recipe.safety.max_aspect, recipe.safety.min_shortest_px) == ("mine", 5.0, 99)
    assert (recipe.queries["sample"].k, recipe.queries["sample"].mode) == (2, "sample")
    top = tmp_path / "top.yaml"
    top.write_text("base: mine.yaml\n")
    with pytest.raises(ConfigError, match=r"base mine\.yaml has a base of its own; a recipe may stand on one only"):
        load_recipe(CurateRecipe, str(top))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("safety.max_aspekt=3", "unknown key 'safety.max_aspekt'; did you mean 'max_aspect'? known keys: "),
        ("saftey.max_aspect=3", "unknown key 'saftey'; did you mean 'safety'? known keys: name, pool,"),
        ("queries.sample.kk=3", "unknown key 'queries.sample.kk'; did you mean 'k'? known keys: location, kind,"),
        ("shard_rows=many", "key 'shard_rows': got 'many'; input should be a valid integer"),
        ("edges.num_lists=1000", "got 20000, allowed with edges.num_lists=1000: 39000 (39 a list) and above"),
        ("shard_rows=0", "key 'shard_rows': got 0; input should be greater than or equal to 1"),
        ("queries.sample.mode=some", "key 'queries.sample.mode': got 'some'; input should be 'as_is',"),
        ("queries.even={mode: balanced}", "total is missing, and mode balanced needs it"),
        ("queries.even={mode: balanced, total: 9, kind: folder}", "kind is given, and mode balanced draws from"),
        ("queries.even={mode: balanced, total: 9, location: x}", "leave location out"),
        ("queries.near={kind: folder}", "location is missing, and mode sample needs it; only mode balanced takes none"),
        ("queries.near={location: x, mode: cluster}", "kind is missing, and mode cluster needs it"),
        ("queries.sample.total=9", "total is given, and mode sample takes none; only mode balanced does"),
        (
            "hierarchy.levels=[{num_clusters: 17, sample_per_cluster: 1, resampling_steps: 0}]",
            "hierarchy.levels.0.num_clusters = 17: there are only 16 vectors",
        ),
        ("queries.sample.drop_test_matches=true", "drop_test_matches is given, and mode sample takes none of its"),
        ("queries.even={mode: balanced, total: 9, drop_test_matches: false}", "and mode balanced takes none of its"),
        ("semdedup.eps=0", "key 'semdedup.eps': got 0; input should be greater than 0"),
        ("semdedup.eps=2.5", "key 'semdedup.eps': got 2.5; input should be less than or equal to 2"),
        ("semdedup.which_to_keep=first", "key 'semdedup.which_to_keep': got 'first'; input should be 'hard', 'easy'"),
        ("queries.sample.weight=0", "key 'queries.sample.weight': got 0; input should be greater than 0"),
        ("queries.sample.weight=1", "queries: weights add up to 1 and 'as_is' has none; give a weight to every set"),
        ("benchmarks.web={kind: folder, location: x}", "the name 'web' stands twice among sources"),
        ("leakage.benchmarks=[bench]", "leakage.benchmarks names 'bench'; benchmarks of the recipe: benchmark"),
        ("name=two words", "key 'name': got 'two words'"),
        ("safety", "override 'safety': write it as key.sub=value"),
        ("name.more=1", "override 'name.more=1': 'name' holds a value, not further keys"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(CurateRecipe, "smoke", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("base: nowhere\n", "recipe 'nowhere' is not known"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(CurateRecipe, str(path))


def test_unknown_recipes_name_the_known_ones():
    with pytest.raises(ConfigError, match=r"recipe 'smok' is not known; give one of lvd142m, lvd1m, smoke"):
        load_recipe(CurateRecipe, "smok")


def test_dump_is_yaml_of_values_only():
    values = yaml.safe_load(dump_recipe(load_recipe(CurateRecipe, "smoke")))
    assert values["queries"]["cluster"]["min_queries"] == 2
