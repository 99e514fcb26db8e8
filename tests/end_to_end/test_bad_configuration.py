"""Bad configuration: one readable line, exit 2, before any work."""

import pytest

from pipelines.cli import main


def refused(capsys, *arguments: str) -> str:
    assert main(["curate", *arguments]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip()
    assert line.startswith("lvd: ")
    assert "\n" not in line
    assert captured.out == ""
    return line


@pytest.fixture
def fresh(tmp_path, lab):
    return lab.overrides(tmp_path)


def test_a_misspelt_key(capsys, tmp_path, fresh):
    line = refused(capsys, "smoke", *fresh, "fetch.timeout=3")
    assert "unknown key 'fetch.timeout'; did you mean 'timeout_s'?" in line
    assert not (tmp_path / "pool").exists()


def test_a_wrong_type(capsys, tmp_path, fresh):
    assert "key 'cluster.num_clusters': got 'few'" in refused(capsys, "smoke", *fresh, "cluster.num_clusters=few")
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("look.yunet=nowhere.onnx", "look.yunet: got 'nowhere.onnx'"),
        ("embed.name=checkpoint:nowhere.safetensors", "embed.name"),
        ("embed.name=timm:vit_tiny_patch16_224", "embed.weights"),
        ("embed.name=word2vec", "embed.name: got 'word2vec'"),
        ("descriptor.name=sscd:nowhere.pt", "descriptor.name: got 'nowhere.pt'"),
        ("screen.block_list_files=[nowhere.txt]", "nowhere.txt"),
        ("safety.blocked_sha256_files=[nowhere.txt]", "safety.blocked_sha256_files: 'nowhere.txt': No such file"),
        ("safety.blocked_pdq_files=[nowhere.csv]", "safety.blocked_pdq_files: 'nowhere.csv': No such file"),
    ],
)
def test_missing_weights_and_files(capsys, tmp_path, fresh, override, message):
    line = refused(capsys, "smoke", *fresh, override)
    assert message in line
    assert "nowhere" in line or "cache" in line or "allowed" in line
    assert not (tmp_path / "pool").exists()


def test_rules_of_block_lists_that_are_none(capsys, tmp_path, fresh):
    line = refused(capsys, "smoke", *fresh, "screen.blocked_hosts=[bad.test, github.io]")
    assert "screen.blocked_hosts: got 'github.io': a public suffix, below which anybody registers names; " in line
    listed = tmp_path / "rules.txt"
    listed.write_text("bad.test\n||ads.example^\n")
    line = refused(capsys, "smoke", *fresh, f"screen.block_list_files=[{listed}]")
    assert f"screen.block_list_files: {listed} line 2: got '||ads.example^': no host; allowed are HOST" in line
    assert not (tmp_path / "pool").exists()


def test_a_descriptor_without_thresholds(capsys, tmp_path, fresh):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"x")
    unknown = ("descriptor.duplicate_threshold=null", "descriptor.leakage_threshold=null")
    model = ("descriptor.name=timm:resnet10t", f"descriptor.weights={weights}")
    line = refused(capsys, "smoke", *fresh, *unknown, *model)
    assert "descriptor.duplicate_threshold: got none, and none is known for 'timm:resnet10t'" in line


def test_a_path_that_does_not_exist(capsys, tmp_path):
    recipe = tmp_path / "folders.yaml"
    recipe.write_text(
        f"name: folders\npool: {tmp_path}/pool\nrun: {tmp_path}/run\n"
        "sources: {mine: {kind: folder, location: no/such/folder}}\n"
    )
    assert "sources.mine.location: 'no/such/folder' does not exist" in refused(capsys, str(recipe))
    assert not (tmp_path / "pool").exists()


@pytest.mark.slow
def test_a_run_of_another_recipe(capsys, lab, undisturbed):
    line = refused(capsys, "smoke", *lab.overrides(undisturbed, "name=other"))
    assert "holds a run of recipe 'smoke', not of 'other'" in line


@pytest.mark.slow
def test_another_size_of_shards(capsys, lab, undisturbed):
    line = refused(capsys, "smoke", *lab.overrides(undisturbed, "shard_rows=31"))
    assert "shard_rows" in line
    assert "30" in line


def test_a_full_disk(capsys, tmp_path, fresh):
    line = refused(capsys, "smoke", *fresh, "execution.min_free_gb=1000000")
    assert "GB free on the disk of" in line
    assert "execution.min_free_gb is 1e+06" in line
    assert not (tmp_path / "pool").exists()


def test_a_root_that_cannot_be_written(capsys, tmp_path, fresh):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(capsys, "smoke", *fresh, f"run={tmp_path}/file/run")


def test_one_folder_for_pool_and_run(capsys, tmp_path, fresh):
    assert "which is the pool too" in refused(capsys, "smoke", *fresh, f"run={tmp_path}/pool")


@pytest.mark.slow
def test_a_damaged_part_names_the_file(capsys, lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "copy")
    part = folder / "run" / "safety" / "part-004000001.parquet"
    part.unlink()
    part.write_bytes(b"PAR1 not quite")
    assert "safety/part-004000001.parquet is damaged" in refused(capsys, "smoke", *lab.overrides(folder))


def test_a_stage_that_does_not_exist(capsys, fresh):
    line = refused(capsys, "smoke", *fresh, "--until", "hashing")
    assert "--until 'hashing' is not a stage; stages: screen_keys," in line


def test_no_run_there(capsys, tmp_path):
    assert main(["funnel", "--run", str(tmp_path / "nothing")]) == 2
    assert "no run at" in capsys.readouterr().err
