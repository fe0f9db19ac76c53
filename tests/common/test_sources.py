"""Where data come from: D4RL's and OGBench's files over a loopback server, Minari, the envs."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from test_datasets import error_of, write

from common import datasets, envs
from common.datasets import __main__ as command
from common.datasets import d4rl, download, mirrors, reference_scores
from common.datasets import minari as minari_reader
from common.datasets import ogbench as ogbench_reader
from common.envs import d4rl as d4rl_envs

h5py = pytest.importorskip("h5py")
gymnasium = pytest.importorskip("gymnasium")
ROOT = Path(__file__).resolve().parents[2]


# --- A server -----------------------------------------------------------------------------------
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; drops the connection after `drop` bytes as often as `drops` says."""

    protocol_version = "HTTP/1.0"  # ended by the server, so that a drop looks like one

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        body = server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start, found = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        tag = f'"{hashlib.sha256(body).hexdigest()}"' if server.tag is None else server.tag
        same = not server.heeds or self.headers.get("If-Range", tag) == tag
        if found and server.ranges and same:
            start = int(found[1])
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if server.version:
            self.send_header(server.version, tag)
        if start:
            self.send_header("Content-Range", server.said.format(start, len(body) - 1, len(body)))
        self.end_headers()
        end = len(body)
        if server.drops > 0:
            server.drops -= 1
            end = min(end, start + server.drop)
        self.wfile.write(body[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.drops, server.drop = {}, [], 0, 0
        server.heeds, server.tag = True, None  # whether If-Range counts; the version's name
        server.ranges, server.version, server.said = True, "ETag", "bytes {}-{}/{}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/"
        yield server
        server.shutdown()


def no_check(path):
    pass


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_is_resumed_where_the_connection_broke(server, tmp_path):
    body = np.random.default_rng(0).bytes(100_000)
    server.files["/x"], server.drops, server.drop = body, 2, 30_000
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == body
    assert [asked for _, asked in server.asked] == [None, "bytes=30000-", "bytes=60000-"]
    assert listing(tmp_path) == ["x", "x.json"]
    record = json.loads((tmp_path / "x.json").read_text())
    assert record == {
        "url": server.url + "x",
        "bytes": 100_000,
        "sha256": download.sha256(tmp_path / "x"),
    }
    assert download.changed(tmp_path / "x") is None
    (tmp_path / "x").write_bytes(body[:-1])
    assert "99,999 bytes, but 100,000" in download.changed(tmp_path / "x")
    (tmp_path / "x").write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    assert re.match(r"SHA-256 .* was downloaded", download.changed(tmp_path / "x"))


def test_a_later_call_goes_on_with_the_half(server, tmp_path):
    server.files["/x"], server.drops, server.drop = b"a" * 1000, 10, 100
    with pytest.raises(OSError, match="after 500 of 1,000 bytes"):
        download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert listing(tmp_path) == ["x.part", "x.part.json"]
    server.drops = 0
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert server.asked[-1][1] == "bytes=500-"
    assert (tmp_path / "x").read_bytes() == b"a" * 1000


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.files["/x"], server.drops, server.drop, server.ranges = b"a" * 1000, 1, 100, False
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == b"a" * 1000


@pytest.mark.parametrize("version", ["ETag", "Last-Modified"])
def test_a_file_replaced_between_two_calls_is_not_joined_to_the_old_half(server, tmp_path, version):
    new, server.version = b"b" * 1000, version
    server.files["/x"], server.drops, server.drop = b"a" * 1000, 10, 100
    with pytest.raises(OSError, match="connection ended"):
        download.fetch([server.url + "x"], tmp_path / "x", no_check)
    server.files["/x"], server.drops = new, 0  # as long as the old one: only the version tells
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert server.asked[-1][1] == "bytes=500-" and (tmp_path / "x").read_bytes() == new
    assert listing(tmp_path) == ["x", "x.json"]


@pytest.mark.parametrize("half", [b"old" * 10, b"old" * 1000])  # shorter, longer than the file
def test_a_half_of_which_nothing_is_known_is_thrown_away(server, tmp_path, half):
    server.files["/x"] = b"new" * 100
    (tmp_path / "x.part").write_bytes(half)
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == b"new" * 100
    assert [asked for _, asked in server.asked] == [None]


@pytest.mark.parametrize("size", [1000, 1200])
@pytest.mark.parametrize("tags", ["ETag", "Last-Modified"])
def test_a_server_that_ignores_if_range_is_noticed(server, tmp_path, size, tags):
    """Its version of the second part or the size of the whole tells."""
    server.version, server.heeds = tags, False
    server.files["/x"], server.drops, server.drop = b"a" * 1000, 10, 100
    with pytest.raises(OSError, match="connection ended"):
        download.fetch([server.url + "x"], tmp_path / "x", no_check)
    server.files["/x"], server.drops = b"b" * size, 0
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == b"b" * size


@pytest.mark.parametrize("tag", ['W/"1"', ""])
def test_a_weak_or_empty_tag_names_no_version(server, tmp_path, tag):
    server.tag, server.files["/x"], server.drops, server.drop = tag, b"a" * 1000, 1, 100
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert [asked for _, asked in server.asked] == [None, None]


def test_a_call_killed_before_the_check_downloads_nothing_again(server, tmp_path):
    def killed(path):
        raise KeyboardInterrupt

    server.files["/x"] = b"a" * 1000
    with pytest.raises(KeyboardInterrupt):
        download.fetch([server.url + "x"], tmp_path / "x", killed)
    assert listing(tmp_path) == ["x.part", "x.part.json"]
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert len(server.asked) == 1 and listing(tmp_path) == ["x", "x.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"bytes": "9"}', '{"bytes": null, "sha256": 3}', '{"bytes": 1}']
)
def test_a_record_that_is_no_record_says_nothing(tmp_path, text):
    (tmp_path / "x").write_bytes(b"a")
    (tmp_path / "x.json").write_text(text)
    assert download.changed(tmp_path / "x") is None


def test_a_server_that_names_no_version_starts_again(server, tmp_path):
    server.files["/x"], server.drops, server.drop, server.version = b"a" * 1000, 1, 100, None
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == b"a" * 1000
    assert [asked for _, asked in server.asked] == [None, None]


@pytest.mark.parametrize("said", ["bytes 0-{1}/{2}", "bytes {0}-{1}/*", "bytes {0}-{0}/{2}", ""])
def test_bytes_of_another_range_are_not_appended(server, tmp_path, said):
    server.files["/x"], server.drops, server.drop, server.said = b"ab" * 500, 1, 101, said
    download.fetch([server.url + "x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == b"ab" * 500
    assert [asked for _, asked in server.asked] == [None, "bytes=101-", None]


def test_a_half_is_not_continued_from_another_server(server, tmp_path):
    server.files |= {"/one/x": b"a" * 1000, "/two/x": b"b" * 1000}
    server.drops, server.drop = 5, 100
    download.fetch([server.url + "one/x", server.url + "two/x"], tmp_path / "x", no_check)
    assert (tmp_path / "x").read_bytes() == b"b" * 1000
    assert server.asked[-1] == ("/two/x", None)


def test_the_second_address_is_tried(server, tmp_path):
    server.files["/there/x"] = b"abc"
    urls = [
        server.url.replace("http", "https") + "there/x",
        server.url + "no",
        server.url + "there/x",
    ]
    download.fetch(urls, tmp_path / "x", no_check)
    assert json.loads((tmp_path / "x.json").read_text())["url"] == urls[2]
    with pytest.raises(OSError, match=r"http: HTTP 404.*; http: HTTP 404"):
        download.fetch([server.url + "no", server.url + "no2"], tmp_path / "y", no_check)
    assert "y" not in listing(tmp_path)


def test_two_downloads_at_once_are_one(server, tmp_path):
    server.files["/x"] = np.random.default_rng(0).bytes(3_000_000)
    threads = [
        threading.Thread(target=download.fetch, args=([server.url + "x"], tmp_path / "x", no_check))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1 and (tmp_path / "x").read_bytes() == server.files["/x"]


# --- D4RL ---------------------------------------------------------------------------------------
def d4rl_rows(size, actions, count=40):
    draw = np.random.default_rng(0)
    return {
        "observations": draw.normal(size=(count, size)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (count, actions)).astype(np.float32),
        "rewards": draw.uniform(size=count).astype(np.float32),
        "terminals": np.arange(count) == 9,
        "timeouts": np.arange(count) % 20 == 19,
    }


@pytest.fixture
def d4rl_server(server, tmp_path, monkeypatch):
    """D4RL's layout of files on the loopback; https there is refused, so http is tried next."""
    monkeypatch.setattr(
        d4rl, "SERVERS", (server.url.replace("http", "https") + "data/", server.url + "data/")
    )
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))

    def put(name, rows):
        path = write(tmp_path / "source.hdf5", rows)
        server.files["/data/" + reference_scores.table()[name]["file"]] = Path(path).read_bytes()

    server.put = put
    return server


def test_d4rl_name_is_downloaded_once_and_loaded(d4rl_server, tmp_path, capsys):
    d4rl_server.put("hopper-medium-v2", d4rl_rows(11, 3))
    d4rl_server.drops, d4rl_server.drop = 1, 2000
    dataset = datasets.load("hopper-medium-v2")
    text = capsys.readouterr().out
    assert "licence of the data: CC BY 4.0" in text
    assert len(dataset.transitions.reward) == 38  # 40 and two time limits
    assert (dataset.ref_min_score, dataset.ref_max_score) == (-20.272305, 3234.3)
    assert dataset.horizon == 1000 and dataset.record["env"] == "Hopper-v4"
    assert dataset.id == "hopper-medium-v2" and datasets.suite(dataset.id) == "mujoco"
    asked = len(d4rl_server.asked)
    assert asked == 2 and d4rl_server.asked[-1][1] == "bytes=2000-"
    assert listing(tmp_path / "d4rl") == ["hopper_medium-v2.hdf5", "hopper_medium-v2.hdf5.json"]
    datasets.load("hopper-medium-v2")
    assert len(d4rl_server.asked) == asked


def test_d4rl_wrong_files_are_one_line_and_leave_nothing(d4rl_server, tmp_path, capsys):
    name, path = "hopper-medium-v2", "/data/" + reference_scores.table()["hopper-medium-v2"]["file"]
    d4rl_server.files[path] = b"<html>moved</html>"
    assert "not an HDF5 file" in error_of(capsys, datasets.load, name)
    rows = d4rl_rows(11, 3)
    d4rl_server.put(name, {key: x for key, x in rows.items() if key != "actions"})
    assert "the file that came has no actions" in error_of(capsys, datasets.load, name)
    d4rl_server.put(name, rows | {"actions": rows["actions"][:5]})
    assert "columns of different lengths" in error_of(capsys, datasets.load, name)
    del d4rl_server.files[path]
    text = error_of(capsys, datasets.load, name)
    assert "hopper-medium-v2: not in " in text and "HTTP 404" in text
    assert listing(tmp_path / "d4rl") == []


def test_d4rl_file_changed_since_the_download_is_one_line(d4rl_server, tmp_path, capsys):
    d4rl_server.put("hopper-medium-v2", d4rl_rows(11, 3))
    datasets.load("hopper-medium-v2")
    path = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    with h5py.File(path, "r+") as file:
        file["rewards"][3] += 1  # as long as before
    text = error_of(capsys, datasets.load, "hopper-medium-v2")
    assert "SHA-256" in text and "delete it and hopper_medium-v2.hdf5.json" in text
    with path.open("ab") as file:
        file.write(b"x")
    text = error_of(capsys, datasets.load, "hopper-medium-v2")
    assert "bytes, but" in text and "delete it and hopper_medium-v2.hdf5.json" in text
    assert "bytes, but" in error_of(capsys, datasets.load, str(path))


@pytest.mark.parametrize("column", ["observations", "timeouts"])
def test_d4rl_file_with_a_damaged_part_is_refused_at_the_download(
    d4rl_server, tmp_path, capsys, column
):
    """Compressed rows are unpacked once, so damage in the middle does not wait for the load."""
    name = "hopper-medium-v2"
    with h5py.File(tmp_path / "source.hdf5", "w") as file:
        for key, array in d4rl_rows(11, 3).items():
            file.create_dataset(key, data=array, compression="gzip")
        place = file[column].id.get_chunk_info(0).byte_offset
    body = bytearray((tmp_path / "source.hdf5").read_bytes())
    body[place : place + 20] = bytes(20)
    d4rl_server.files["/data/" + reference_scores.table()[name]["file"]] = bytes(body)
    assert "not an HDF5 file" in error_of(capsys, datasets.load, name)
    assert listing(tmp_path / "d4rl") == []


def test_d4rl_without_a_server_is_one_line(tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(d4rl, "SERVERS", (f"http://127.0.0.1:{port}/",))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    text = error_of(capsys, datasets.load, "antmaze-umaze-v2")
    assert "the download failed" in text and "refused" in text and "D4RL_DATASET_DIR" in text


def test_every_d4rl_name_has_a_file_and_most_an_env():
    rows = reference_scores.table()
    assert len(rows) == 61 and all(row["file"].endswith(".hdf5") for row in rows.values())
    assert [n for n, r in rows.items() if not r["env_id"]] == [n for n in rows if "-eval-" in n]
    expected = {  # one of each pattern, from D4RL's infos.py
        "walker2d-medium-replay-v2": "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5",
        "maze2d-large-v1": "maze2d/maze2d-large-sparse-v1.hdf5",
        "maze2d-large-dense-v1": "maze2d/maze2d-large-dense-v1.hdf5",
        "pen-cloned-v1": "hand_dapg_v1/pen-cloned-v1.hdf5",
        "antmaze-medium-diverse-v2": "ant_maze_v2/"
        "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
    }
    assert {name: rows[name]["file"] for name in expected} == expected


def test_a_file_of_a_d4rl_name_is_known_by_its_name(tmp_path):
    for stem in ("hopper-medium-v2", "hopper_medium-v2"):
        dataset = datasets.load(write(tmp_path / f"{stem}.hdf5", d4rl_rows(11, 3)))
        assert dataset.horizon == 1000 and dataset.ref_max_score == 3234.3


def antmaze_rows():
    """Two walks that go on after the goal in row 9; the jump in row 29 has no time limit."""
    rows = d4rl_rows(29, 8)
    rows["observations"][:, :2] = 0.1 * np.arange(40)[:, None]
    rows["observations"][30:, :2] += 8
    rows["timeouts"] = np.arange(40) == 19
    return rows


def test_antmaze_walks_go_on_after_the_goal(d4rl_server):
    pytest.importorskip("gymnasium_robotics")
    d4rl_server.put("antmaze-umaze-v2", antmaze_rows())
    dataset = datasets.load("antmaze-umaze-v2")
    assert dataset.episode_ends.tolist() == [19, 28, 37]  # one row less each: no next observation
    assert np.flatnonzero(dataset.transitions.termination).tolist() == [9]
    t = dataset.transitions
    np.testing.assert_array_equal(t.next_observation[9], t.observation[10])
    assert dataset.record["env"] == "AntMaze_UMaze-v4 + D4RLAntMaze" and dataset.horizon == 700


def test_antmaze_without_time_limits_is_refused(tmp_path, capsys):
    rows = antmaze_rows()
    whole = write(tmp_path / "antmaze-umaze-v2.hdf5", rows | {"timeouts": rows["timeouts"][:1]})
    assert "1 rows of timeouts but 40" in error_of(capsys, datasets.load, whole)
    del rows["timeouts"]
    text = error_of(capsys, datasets.load, write(tmp_path / "antmaze-umaze-v2.hdf5", rows))
    assert "no array 'timeouts'" in text
    datasets.load(write(tmp_path / "antmaze-umaze-v0.hdf5", rows))
    assert "D4RL's AntMaze data are antmaze-...-v2" in capsys.readouterr().out


def test_a_d4rl_name_in_another_env_has_not_d4rls_pair(tmp_path, capsys):
    path = write(tmp_path / "hopper-medium-v2.hdf5", d4rl_rows(3, 1), env_id="Pendulum-v1")
    dataset = datasets.load(path)
    assert dataset.ref_min_score is None and dataset.horizon == 200
    assert "score column is the plain return" in capsys.readouterr().out
    path = write(tmp_path / "hopper-medium-v2.hdf5", d4rl_rows(11, 3))
    assert datasets.load(path, env="Hopper-v5").ref_max_score == 3234.3
    assert datasets.load(path).horizon == 1000


def test_maze2d_flags_are_new_targets(d4rl_server):
    pytest.importorskip("gymnasium_robotics")
    rows = d4rl_rows(4, 2)
    rows["terminals"], rows["timeouts"] = rows["timeouts"], rows["terminals"]
    d4rl_server.put("maze2d-umaze-v1", rows)
    dataset = datasets.load("maze2d-umaze-v1")
    assert dataset.transitions.termination.sum() == 0
    assert dataset.episode_ends.tolist() == [9, 18, 37]
    assert dataset.record["env"] == "atoll/PointMaze_UMaze-v0 + D4RLMaze2d"


@pytest.mark.parametrize("name", ["kitchen-mixed-v0", "pen-human-v1", "ant-medium-v2"])
def test_other_d4rl_names_are_evaluated_with_d4rls_layout(d4rl_server, name):
    pytest.importorskip("gymnasium_robotics")
    sizes = {"kitchen-mixed-v0": (60, 9), "pen-human-v1": (45, 24), "ant-medium-v2": (111, 8)}
    d4rl_server.put(name, d4rl_rows(*sizes[name]))
    dataset = datasets.load(name)
    env = dataset.make_env()
    observation, _ = env.reset(seed=0)
    assert observation.shape == sizes[name][:1]
    *_, info = env.step(env.action_space.sample())
    assert "success" in info or name.startswith("ant")
    if name.startswith("kitchen"):  # robot, objects, then the goal of its four tasks
        assert np.flatnonzero(observation[30:]).tolist() == [11, 12, 17, 18, 22, *range(23, 27), 29]


# --- D4RL's envs --------------------------------------------------------------------------------
def counterpart(name, **options):
    pytest.importorskip("gymnasium_robotics")
    row = reference_scores.row_of(name)
    steps = int(row["max_episode_steps"])
    env = envs.make(row["env_id"], max_episode_steps=steps, **d4rl_envs.options(row))
    return d4rl_envs.adapt(env, row, 0, True)


def test_palm_sign_of_door_as_recorded(atoll_data):
    """The file has both rewards: D4RL's, and what gymnasium-robotics itself returned."""
    with h5py.File(atoll_data / "adroit-door-human-replay.hdf5") as file:
        rows = {name: file[name][()] for name in ("observations", "terminals", "timeouts")}
        following = file["next_observations"][()].astype(np.float64)
        theirs = file["rewards"][()].astype(np.float64)
        ours = file["infos/reward_gymrobotics"][()].astype(np.float64)
    palm = np.linalg.norm(following[:, 35:38], axis=1)
    np.testing.assert_allclose(ours - 0.2 * palm, theirs, atol=2e-6)
    assert d4rl_envs.flipped("AdroitHandDoor-v1", rows | {"rewards": theirs})
    assert not d4rl_envs.flipped("AdroitHandDoor-v1", rows | {"rewards": ours})
    assert not d4rl_envs.flipped("Hopper-v4", rows | {"rewards": theirs})


def test_door_replayed_in_the_simulator_gives_d4rls_rewards(atoll_data, capsys):
    path = atoll_data / "adroit-door-human-replay.hdf5"
    dataset = datasets.load(str(path))
    assert dataset.record["env"] == "AdroitHandDoor-v1 + D4RLReward" and dataset.horizon == 200
    with h5py.File(path) as file:
        state = {name: file[f"infos/{name}"][()] for name in ("qpos", "qvel", "door_body_pos")}
    env, t = dataset.make_env(), dataset.transitions
    errors = []
    for row in range(0, len(t.reward), 67):
        env.reset(seed=0)
        env.unwrapped.set_env_state({k: x[row].astype(np.float64) for k, x in state.items()})
        observation, reward, *_ = env.step(t.action[row])
        errors.append((np.abs(observation - t.next_observation[row]).max(), reward - t.reward[row]))
    largest = np.abs(errors).max(axis=0)
    with capsys.disabled():
        print(
            f"\ndoor: {len(errors)} rows, largest error {largest[0]:.1e}, reward {largest[1]:.1e}"
        )
    assert (largest < 1e-2).all()


@pytest.mark.parametrize("name", ["relocate-human-v1", "hammer-human-v1"])
def test_palm_distance_in_the_observation_is_the_simulators(name):
    env = counterpart(name)
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        observation, *_ = env.step(env.action_space.sample())
    inner = env.unwrapped
    palm = inner.data.site_xpos[inner.S_grasp_site_id]
    distance = np.linalg.norm(palm - inner.data.xpos[inner.obj_body_id])
    found = np.linalg.norm(d4rl_envs.PALM[env.spec.id](observation))
    assert found == pytest.approx(distance)


def test_the_pen_may_not_be_dropped():
    env = counterpart("pen-human-v1")
    observation, _ = env.reset(seed=0)
    ended = False
    while not ended:
        observation, _, termination, truncation, _ = env.step(np.full(24, -1.0, np.float32))
        assert termination == (observation[26] < 0.075)
        ended = termination or truncation


def test_antmaze_is_d4rls_ant_in_d4rls_maze():
    """Origin at the start, y along the rows, torques of 30 every 0.1 s, the end at the goal."""
    for name, goal in (("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))):
        env = counterpart(f"antmaze-{name}{'-play' if name != 'umaze' else ''}-v2")
        ant = env.unwrapped.ant_env
        assert (ant.model.actuator_gear[:, 0] * ant.model.actuator_ctrlrange[:, 1] == 30).all()
        assert ant.model.opt.timestep * ant.frame_skip == pytest.approx(0.1)
        observation, _ = env.reset(seed=0)
        assert observation.shape == (29,) and np.abs(observation[:2]).max() <= 0.1
        distance = env.goal - goal
        assert (distance >= 0).all() and (distance <= 1.5).all()
        walls = {
            tuple(np.round(place[:2] - env.origin).astype(int).tolist())
            for place, size in zip(ant.model.geom_pos, ant.model.geom_size, strict=True)
            if size[0] == 2.0
        }
        layout = np.array(env.unwrapped.maze.maze_map[::-1])  # D4RL's map, its start in row 1
        assert walls == {(4 * (j - 1), 4 * (i - 1)) for i, j in np.argwhere(layout == 1).tolist()}
        assert layout[1, 1] == 0 and layout[goal[1] // 4 + 1, goal[0] // 4 + 1] == 0
        state = ant.data.qpos.copy()
        state[:2] = env.goal + env.origin
        ant.set_state(state, np.zeros(ant.model.nv))
        _, reward, termination, _, info = env.step(np.zeros(8, np.float32))
        assert reward == 1 and termination and info["success"]
        again, _ = env.reset(seed=0)
        np.testing.assert_array_equal(again, observation)


def test_maze2d_has_d4rls_axes():
    """D4RL's umaze: goal at (1, 1), the way to it from (3, 1) leads over (3, 3) and (1, 3)."""
    env = counterpart("maze2d-umaze-v1")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(50)])
    cells = {tuple(cell) for cell in np.round(starts[:, :2]).astype(int).tolist()}
    assert cells == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    assert np.abs(starts[:, :2] - np.round(starts[:, :2])).max() <= 0.1
    seed = next(i for i, x in enumerate(starts) if tuple(np.round(x[:2])) == (1, 1))
    env.reset(seed=seed)
    observation, reward, *_, info = env.step(np.zeros(2, np.float32))
    assert reward == 1 and info["success"]
    moved = [env.step(np.array([0, 1], np.float32))[0] for _ in range(40)][-1]
    assert moved[1] - observation[1] > 0.5 and abs(moved[0] - observation[0]) < 0.2  # along a row
    assert moved[3] > 0
    dense = counterpart("maze2d-umaze-dense-v1")
    dense.reset(seed=seed)
    observation, reward, *_ = dense.step(np.zeros(2, np.float32))
    assert reward == pytest.approx(np.exp(-np.linalg.norm(observation[:2] - 1)), rel=1e-5)


D4RL_UMAZE = ("#####", "#GOO#", "###O#", "#OOO#", "#####")
D4RL_POINT = """<mujoco><compiler inertiafromgeom="true" angle="radian"/>
<option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
<default><joint damping="1" limited="false"/><geom friction=".5 .1 .1" density="1000"
margin="0.002" condim="1" contype="2" conaffinity="1"/></default><worldbody>
<geom size="40 40 0.25" pos="0 0 -0.1" type="plane" contype="1" conaffinity="0"/>
<body pos="1.2 1.2 0"><geom type="sphere" size="0.1" contype="1"/>
<joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/></body>
WALLS</worldbody><actuator><motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
<motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/></actuator></mujoco>"""


def test_maze2d_moves_as_d4rls_point():
    """Against a model with D4RL's numbers, walls included: positions, speeds and rewards."""
    import mujoco

    env = counterpart("maze2d-umaze-v1")
    box = '<geom conaffinity="1" type="box" pos="{} {} 0" size="0.5 0.5 0.2"/>'
    cells = [(i, j) for i in range(5) for j in range(5) if D4RL_UMAZE[i][j] == "#"]
    walls = "".join(box.format(i + 1.0, j + 1.0) for i, j in cells)
    model = mujoco.MjModel.from_xml_string(D4RL_POINT.replace("WALLS", walls))
    data, draw = mujoco.MjData(model), np.random.default_rng(0)
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        x, y, speed_x, speed_y = env.unwrapped.point.state_vector()
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = env.corner + np.array([-y, x]), (-speed_y, speed_x)
        for step in range(150):
            if step % 15 == 0:
                action = draw.uniform(-1, 1, 2).astype(np.float32)
            observation, reward, *_ = env.step(action)
            data.qvel[:] = data.qvel.clip(-5, 5)
            mujoco.mj_forward(model, data)
            data.ctrl[:] = action
            mujoco.mj_step(model, data)
            expected = np.concatenate([data.qpos, data.qvel])
            np.testing.assert_allclose(observation, expected, atol=1e-5)
            assert reward == (np.linalg.norm(data.qpos - 1) <= 0.5)


# --- Mirrors ------------------------------------------------------------------------------------
D4RL_FILE = "gym_mujoco_v2/hopper_medium-v2.hdf5"
MIRRORED = {  # data set -> (the variable, the file's place on a server and in a flat mirror)
    "hopper-medium-v2": (mirrors.D4RL, D4RL_FILE, "hopper_medium-v2.hdf5"),
    "pointmaze-medium-navigate-singletask-v0": (
        mirrors.OGBENCH,
        "pointmaze-medium-navigate-v0.npz",
        "pointmaze-medium-navigate-v0.npz",
    ),
}


@pytest.fixture
def mirror(server, tmp_path, monkeypatch):
    """A mirror on the loopback with nothing on it; the original servers have nothing either."""
    ogbench = pytest.importorskip("ogbench")
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", server.url + "down")
    monkeypatch.setattr(d4rl, "SERVERS", (server.url + "down/",))
    for variable in ("D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable in (mirrors.D4RL, mirrors.OGBENCH):
        monkeypatch.delenv(variable, raising=False)
    server.bodies = {
        "hopper-medium-v2": Path(write(tmp_path / "x.hdf5", d4rl_rows(11, 3))).read_bytes(),
        "pointmaze-medium-navigate-singletask-v0": npz(tmp_path),
    }
    return server


@pytest.mark.parametrize("end", ["", "/", " "])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", MIRRORED)
def test_a_mirror_named_by_a_variable_is_asked_first(mirror, monkeypatch, name, flat, end):
    variable, *places = MIRRORED[name]
    mirror.files["/copies/" + places[flat]] = mirror.bodies[name]
    mirror.files["/down/" + places[0]] = b"of the original server"
    monkeypatch.setenv(variable, mirror.url + "copies" + end)
    assert len(datasets.load(name).transitions.reward)
    assert mirror.asked[-1][0] == "/copies/" + places[flat]


@pytest.mark.parametrize("name", MIRRORED)
def test_a_mirror_named_by_the_flag(mirror, monkeypatch, capsys, name):
    variable, place, _ = MIRRORED[name]
    monkeypatch.setenv(variable, "")  # so that what the command sets is undone
    monkeypatch.setenv({mirrors.D4RL: mirrors.OGBENCH, mirrors.OGBENCH: mirrors.D4RL}[variable], "")
    mirror.files["/copies/" + place] = mirror.bodies[name]
    command.main([name, "--mirror", mirror.url + "copies"])
    assert "transitions" in capsys.readouterr().out
    assert mirror.asked[-1][0] == "/copies/" + place


@pytest.mark.parametrize("answer", [None, b"<html>no such file</html>"])
@pytest.mark.parametrize("name", MIRRORED)
def test_where_a_mirror_has_no_usable_file_the_original_server_is_asked(
    mirror, monkeypatch, tmp_path, name, answer
):
    variable, place, flat = MIRRORED[name]
    if answer:
        mirror.files["/copies/" + place] = mirror.files["/copies/" + flat] = answer
    mirror.files["/down/" + place] = mirror.bodies[name]
    monkeypatch.setenv(variable, mirror.url + "copies")
    assert len(datasets.load(name).transitions.reward)
    assert mirror.asked[-1][0] == "/down/" + place


@pytest.mark.parametrize("url", ["nonsense", "htp://x/y", "http://127.0.0.1:1/x"])
@pytest.mark.parametrize("name", MIRRORED)
def test_without_a_server_the_message_names_the_variable_of_a_mirror(
    mirror, monkeypatch, capsys, name, url
):
    variable, place, _ = MIRRORED[name]
    assert f"name a mirror: {variable}=URL" in error_of(capsys, datasets.load, name)
    monkeypatch.setenv(variable, url)
    assert "the download failed" in error_of(capsys, datasets.load, name)
    mirror.files["/copies/" + place] = mirror.bodies[name]  # the remedy
    monkeypatch.setenv(variable, mirror.url + "copies")
    assert len(datasets.load(name).transitions.reward)


def test_a_folder_of_this_machine_is_a_mirror_too(mirror, monkeypatch, tmp_path):
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies/hopper_medium-v2.hdf5").write_bytes(mirror.bodies["hopper-medium-v2"])
    monkeypatch.setenv(mirrors.D4RL, (tmp_path / "copies").as_uri())
    assert len(datasets.load("hopper-medium-v2").transitions.reward) and not mirror.asked


# --- Minari -------------------------------------------------------------------------------------
@pytest.fixture
def minari_root(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


def record(
    dataset_id,
    env_id,
    steps=5,
    episodes=2,
    data_format="hdf5",
    maze_map=None,
    env_options=None,
    **options,
):
    import minari

    if env_id not in gymnasium.registry:
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
    env_options = (env_options or {}) | ({"maze_map": maze_map} if maze_map else {})
    env = minari.DataCollector(gymnasium.make(env_id, **env_options), data_format=data_format)
    env.action_space.seed(0)
    for seed in range(episodes):
        env.reset(seed=seed)
        for _ in range(steps):
            env.step(env.action_space.sample())
    return env.create_dataset(dataset_id, algorithm_name="random", **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dataset_id", "env_id", "keys", "size"),
    [
        (
            "D4RL/antmaze/umaze-diverse-v1",
            "AntMaze_UMaze-v4",
            ["achieved_goal", "observation", "desired_goal"],
            31,
        ),
        ("D4RL/pointmaze/umaze-v2", "PointMaze_UMaze-v3", ["observation", "desired_goal"], 6),
        ("D4RL/kitchen/complete-v2", "FrankaKitchen-v1", ["observation"], 59),
        ("D4RL/door/human-v2", "AdroitHandDoor-v1", [], 39),
        ("mujoco/hopper/medium-v0", "Hopper-v5", [], 11),
    ],
)
def test_minari_suites(minari_root, capsys, dataset_id, env_id, keys, size):
    pytest.importorskip("gymnasium_robotics")
    record(dataset_id, env_id)
    dataset = datasets.load(dataset_id)
    t = dataset.transitions
    assert t.observation.shape == (10, size) and dataset.episode_ends.tolist() == [5, 10]
    assert column_of(t.truncation) == [0, 0, 0, 0, 1] * 2 and t.termination.sum() == 0
    np.testing.assert_array_equal(t.observation[1:5], t.next_observation[:4])
    assert dataset.record["observation_keys"] == keys and dataset.record["env"] == env_id
    env = dataset.make_env()
    first, _ = env.reset(seed=0)
    assert first.shape == (size,) and first.dtype == np.float32
    *_, info = env.step(env.action_space.sample())
    assert "success" in info or "hopper" in dataset_id
    text = capsys.readouterr().out
    said = {"door": "D4RL's of door-human-v1", "kitchen": "kitchen-complete-v0"}
    said |= {"hopper": "D4RL's of hopper-", "maze": "plain return"}
    assert next(words for part, words in said.items() if part in dataset_id) in text


@pytest.mark.filterwarnings("ignore")
def test_minari_antmaze_shows_the_goal_of_each_episode(minari_root):
    """The goal moves between the episodes of 5 of D4RL's 6 AntMaze data sets on Minari."""
    pytest.importorskip("gymnasium_robotics")
    source = record("D4RL/antmaze/medium-play-v1", "AntMaze_Medium-v4")
    goals = [episode.observations["desired_goal"][0] for episode in source.iterate_episodes()]
    assert np.abs(goals[0] - goals[1]).max() > 1
    dataset = datasets.load("D4RL/antmaze/medium-play-v1")
    shown = dataset.transitions.observation[:, -2:].reshape(2, 5, 2)
    np.testing.assert_allclose(shown, np.repeat(np.float32(goals)[:, None], 5, axis=1))
    env = dataset.make_env()
    observation, _ = env.reset(seed=1)
    np.testing.assert_allclose(observation[-2:], env.unwrapped.goal, rtol=1e-6)
    np.testing.assert_allclose(observation[:2], env.unwrapped.ant_env.data.qpos[:2], rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_minari_eval_env_has_the_walls_of_the_data(minari_root, capsys):
    """Minari's own eval env of AntMaze umaze is the mirror image of the recording's."""
    pytest.importorskip("gymnasium_robotics")
    left = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 0, 1, 1, 1], [1, "r", 0, 0, 1], [1] * 5]
    env = gymnasium.make("AntMaze_UMaze-v4", maze_map=left)
    data = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1] * 5]
    options = {"eval_env": env.spec, "maze_map": data}
    record("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", **options)
    made = datasets.load("D4RL/antmaze/umaze-v1").make_env()
    assert "the maze mirrored; turned to the data's walls" in capsys.readouterr().out
    turned = made.unwrapped.maze.maze_map
    assert turned == [
        [1, 1, 1, 1, 1],
        [1, 0, 0, "g", 1],
        [1, 1, 1, 0, 1],
        [1, 0, 0, "r", 1],
        [1] * 5,
    ]
    record("D4RL/antmaze/umaze-v2", "AntMaze_UMaze-v4", eval_env=env.spec, maze_map=left)
    assert datasets.load("D4RL/antmaze/umaze-v2").make_env().unwrapped.maze.maze_map == left
    assert "walls" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_minari_kitchen_pays_each_task_once(minari_root, monkeypatch, capsys):
    pytest.importorskip("gymnasium_robotics")
    recorded = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
    record("D4RL/kitchen/complete-v2", "FrankaKitchen-v1", env_options=recorded)
    dataset = datasets.load("D4RL/kitchen/complete-v2")
    assert "the env pays each task once" in capsys.readouterr().out
    env = dataset.make_env()
    env.reset(seed=0)
    module = sys.modules[type(env.unwrapped).__module__]
    monkeypatch.setattr(module, "BONUS_THRESH", np.inf)  # every task counts as done
    _, reward, termination, _, info = env.step(env.action_space.sample())
    assert reward == len(env.unwrapped.goal)
    assert termination and info["success"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "pair",
    [
        {"ref_max_score": 3.0},
        {"ref_min_score": 3.0, "ref_max_score": 1.0},
        {"ref_min_score": 0, "ref_max_score": 10**400},
    ],
)
def test_minari_metadata_with_half_or_a_reversed_pair_are_one_line(minari_root, capsys, pair):
    record("test/cartpole-v0", "CartPole-v1")
    path = minari_root / "test/cartpole-v0/data/metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | pair))
    text = error_of(capsys, datasets.load, "test/cartpole-v0", actions="any")
    assert "ref_min_score below ref_max_score, or neither" in text


def column_of(array):
    return array.astype(int).tolist()


@pytest.mark.filterwarnings("ignore")
def test_minari_metadata_come_first(minari_root, capsys):
    record("mujoco/hopper/medium-v0", "Hopper-v5", ref_min_score=1.0, ref_max_score=3.0)
    dataset = datasets.load("mujoco/hopper/medium-v0", env_steps=7)
    assert dataset.score(2.0) == 50 and dataset.horizon == 7
    assert "no reference scores" not in capsys.readouterr().out
    assert datasets.load("mujoco/hopper/medium-v0", "Hopper-v4").record["env"] == "Hopper-v4"


@pytest.mark.filterwarnings("ignore")
def test_minari_arrow_and_integer_actions(minari_root):
    pytest.importorskip("pyarrow")
    record("test/cartpole-v0", "CartPole-v1", data_format="arrow")
    dataset = datasets.load("test/cartpole-v0", actions="discrete")
    assert dataset.num_actions == 2 and len(dataset.transitions.reward) == 10


def test_minari_without_network_fails_at_once(minari_root, monkeypatch, capsys):
    def no_name(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    import minari

    monkeypatch.setattr(minari, "download_dataset", lambda *_: pytest.fail("23 s of attempts"))
    text = error_of(capsys, datasets.load, "mujoco/hopper/medium-v0")
    assert (
        "not under " in text and "with a network: minari download mujoco/hopper/medium-v0" in text
    )


@pytest.mark.filterwarnings("ignore")
def test_minari_half_a_download_is_begun_anew(minari_root, monkeypatch, capsys):
    import minari

    begun = []

    def fetch(dataset_id):
        begun.append((minari_root / dataset_id).exists())
        record(dataset_id, "CartPole-v1")

    monkeypatch.setattr(minari_reader, "_reach_server", lambda: None)
    monkeypatch.setattr(minari, "download_dataset", fetch)
    (minari_root / "test/cartpole-v0/data").mkdir(parents=True)
    datasets.load("test/cartpole-v0", actions="any")
    assert "is incomplete, starting it anew" in capsys.readouterr().out
    (minari_root / "test/cartpole-v0/data/main_data.hdf5").unlink()  # metadata only
    datasets.load("test/cartpole-v0", actions="any")
    assert begun == [False, False]
    (minari_root / "test/cartpole-v0/notes.txt").touch()
    (minari_root / "test/cartpole-v0/data/main_data.hdf5").unlink()
    text = error_of(capsys, datasets.load, "test/cartpole-v0", actions="any")
    assert "move it away" in text and (minari_root / "test/cartpole-v0/notes.txt").exists()


@pytest.mark.filterwarnings("ignore")
def test_minari_damaged_file_is_one_line(minari_root, capsys):
    record("test/cartpole-v0", "CartPole-v1")
    file = minari_root / "test/cartpole-v0/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[:500])
    text = error_of(capsys, datasets.load, "test/cartpole-v0", actions="any")
    assert "is damaged" in text and "delete that folder" in text


# --- OGBench ------------------------------------------------------------------------------------
def npz(folder, count=6):
    """OGBench's layout: the last row of each of two episodes is only an observation."""
    path = folder / "source.npz"
    place = np.stack([17 + np.arange(count), np.full(count, 20)], axis=1).astype(np.float32)
    np.savez(
        path,
        observations=place,
        actions=np.full((count, 2), 0.5, np.float32),
        terminals=np.arange(count) % 3 == 2,
        qpos=place,
        qvel=np.zeros((count, 2), np.float32),
    )
    return path.read_bytes()


@pytest.fixture
def ogbench_server(server, tmp_path, monkeypatch):
    ogbench = pytest.importorskip("ogbench")
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", server.url + "ogbench")
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "ogbench"))
    server.files["/ogbench/pointmaze-medium-navigate-v0.npz"] = npz(tmp_path)
    return server


def test_ogbench_name_is_downloaded_and_relabelled(ogbench_server, tmp_path, capsys):
    ogbench_server.drops, ogbench_server.drop = 1, 300
    dataset = datasets.load("pointmaze-medium-navigate-singletask-v0")
    t = dataset.transitions
    assert t.observation[:, 0].tolist() == [17, 18, 20, 21]  # the goal is at (20, 20), radius 1
    assert t.next_observation[:, 0].tolist() == [18, 19, 21, 22]
    assert t.termination.tolist() == [0, 0, 1, 1] and t.reward.tolist() == [-1, -1, 0, 0]
    assert dataset.episode_ends.tolist() == [2, 4]  # masks end no episode
    assert dataset.horizon == 1000 and dataset.ref_min_score is None
    assert dataset.score(np.array([-3.0]), np.array([0.5])).tolist() == [50]
    assert "no reference scores" not in capsys.readouterr().out
    env = dataset.make_env()
    env.reset(seed=0)
    assert "success" in env.step(np.zeros(2, np.float32))[-1]
    assert listing(tmp_path / "ogbench") == [
        "pointmaze-medium-navigate-v0.npz",
        "pointmaze-medium-navigate-v0.npz.json",
    ]
    asked = len(ogbench_server.asked)
    other = datasets.load("pointmaze-medium-navigate-singletask-task2-v0")
    assert other.transitions.termination.sum() == 0 and len(ogbench_server.asked) == asked


def test_ogbench_wrong_files_are_one_line(ogbench_server, tmp_path, capsys):
    name = "pointmaze-medium-navigate-singletask-v0"
    file = "/ogbench/pointmaze-medium-navigate-v0.npz"
    whole = ogbench_server.files[file]
    ogbench_server.files[file] = whole[:-200]
    assert "not an npz file" in error_of(capsys, datasets.load, name)
    with (tmp_path / "other.npz").open("wb") as other:
        np.savez(other, observations=np.zeros(3))
    ogbench_server.files[file] = (tmp_path / "other.npz").read_bytes()
    assert "has no actions, qpos, qvel, terminals" in error_of(capsys, datasets.load, name)
    del ogbench_server.files[file]
    text = error_of(capsys, datasets.load, name)
    assert "HTTP 404" in text and "ogbench.download_datasets(['pointmaze-medium-" in text
    assert listing(tmp_path / "ogbench") == []


def test_a_compressed_ogbench_file_damaged_anywhere_is_one_line(
    ogbench_server, tmp_path, monkeypatch, capsys
):
    """zlib and zipfile have errors of many kinds, at the download and at the load."""
    with np.load(tmp_path / "source.npz") as whole:
        np.savez_compressed(tmp_path / "compressed.npz", **whole)
    body = (tmp_path / "compressed.npz").read_bytes()
    (tmp_path / "ogbench").mkdir()
    path = tmp_path / "ogbench/pointmaze-medium-navigate-v0.npz"
    for at in range(0, len(body) - 20, 37):
        damaged = body[:at] + bytes(20) + body[at + 20 :]
        with contextlib.suppress(download.Unusable):
            (tmp_path / "x.npz").write_bytes(damaged)
            ogbench_reader._check(tmp_path / "x.npz")
        path.write_bytes(damaged)
        try:
            datasets.load("pointmaze-medium-navigate-singletask-v0")
        except SystemExit as leave:
            assert leave.code == 2
            assert len(capsys.readouterr().err.splitlines()) == 1


def test_ogbench_unknown_env_is_one_line(ogbench_server, tmp_path, capsys):
    ogbench_server.files["/ogbench/cube-none-play-v0.npz"] = npz(tmp_path)
    text = error_of(capsys, datasets.load, "cube-none-play-singletask-v0")
    assert "env cube-none-singletask-v0: cannot be made" in text


@pytest.mark.parametrize("env_id", ["AntMaze_UMaze-v4", "pointmaze-medium-singletask-v0"])
def test_envs_leave_no_files_behind(env_id, tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics")
    pytest.importorskip("ogbench")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = envs.make(env_id)
    env.reset(seed=0)
    env.close()
    assert listing(tmp_path) == []


# --- Ids ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dataset_id", "words"),
    [
        ("hopper-medum-v2", "did you mean hopper-medium-v2"),
        ("local/pointmaze/u-maze-v0", "did you mean local/pointmaze/umaze-v0"),
        ("local/ogbench/cube-single-v0", "did you mean local/ogbench/cube-single-"),
        ("D4RL/antmaze/umaze", "D4RL/antmaze/umaze-v1"),
        ("mujoco/swimmer/novel", "mujoco/swimmer/novel-v0"),
        ("cube-single-play-v0", "cube-single-play-singletask-v0"),
        ("Pendulum-v1", "did you mean env/Pendulum-v1?"),
        ("zzz", "docs/data.md lists the forms of an id"),
    ],
)
def test_unknown_ids_name_near_ones(capsys, dataset_id, words):
    text = error_of(capsys, datasets.load, dataset_id)
    assert "no such data set" in text and words in text


# --- OGBench recipes ----------------------------------------------------------------------------
def run_recipe(folder, name, *flags, kill_after=None):
    env = os.environ | {"OGBENCH_DATASET_DIR": str(folder)}
    command = [sys.executable, "-m", "common.recipes", f"local/ogbench/{name}", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if kill_after:
        parts = folder / "local" / f".making-{name}"
        while process.poll() is None and len(list(parts.glob("*.npz"))) < kill_after:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.kill()
    return process.communicate()[0], process.returncode


def test_ogbench_recipe_is_the_same_file_interrupted_or_parallel(tmp_path, monkeypatch):
    pytest.importorskip("ogbench")
    name = "pointmaze-medium-navigate-v0"
    run_recipe(tmp_path / "a", name, "--episodes", "3", "--workers", "1", kill_after=2)
    parts = tmp_path / "a" / "local" / f".making-{name}"
    assert len(list(parts.glob("*.npz"))) >= 2
    text, code = run_recipe(tmp_path / "a", name, "--episodes", "3", "--workers", "1")
    assert code == 0 and " to go" in text and "4 to go" not in text, text
    assert listing(tmp_path / "a" / "local") == [
        f"{name.removesuffix('-v0')}-v0-val.npz",
        f"{name}.about.json",
        f"{name}.npz",
    ]
    text, code = run_recipe(tmp_path / "b", name, "--episodes", "3", "--workers", "2")
    assert code == 0, text
    for file in (f"{name}.npz", f"{name}-val.npz"):
        first, second = ((tmp_path / x / "local" / file).read_bytes() for x in "ab")
        assert first == second
    with np.load(tmp_path / "a" / "local" / f"{name}.npz") as file:
        assert file["observations"].shape == (3003, 2) and file["terminals"].sum() == 3
        position = file["observations"]
        assert not np.array_equal(position[:1001], position[1001:2002])
    (tmp_path / "file").touch()
    text, code = run_recipe(tmp_path / "file", name)
    assert code == 2 and "cannot be made in" in text and "Traceback" not in text
    text, code = run_recipe(tmp_path / "a", name, "--episodes", "4")
    assert code == 2 and "holds 3 episodes, not 4" in text
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "a"))
    dataset = datasets.load(f"local/ogbench/{name}")
    assert len(dataset.transitions.reward) == 3000 and dataset.score_is_success
    assert dataset.record["env"] == "pointmaze-medium-singletask-v0"
    assert dataset.record["episodes"] == 3  # by which a report knows the official size
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as leave:  # load makes what is missing, in another process
        datasets.load(f"local/ogbench/{name}")
    assert leave.value.code == 2
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "a"))
    again = datasets.load("local/ogbench/pointmaze-medium-navigate-singletask-task2-v0")
    assert again.record["env"] == "pointmaze-medium-singletask-task2-v0"


def test_two_processes_that_make_one_recipe_make_it_once(tmp_path):
    pytest.importorskip("ogbench")
    name, flags = "pointmaze-medium-navigate-v0", ("--episodes", "3", "--workers", "1")
    ends = []
    pair = [
        threading.Thread(target=lambda: ends.append(run_recipe(tmp_path, name, *flags)))
        for _ in range(2)
    ]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert [code for _, code in ends] == [0, 0], ends
    assert sum("made: " in text for text, _ in ends) == 1, ends
    assert not [x for x in listing(tmp_path / "local") if x.startswith(".")]


def test_ctrl_c_and_a_closed_pipe_leave_no_traceback(tmp_path):
    def ends(body, out=subprocess.PIPE):
        code = f"""
import signal
from common import command_line
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def main():
    {body}
command_line.run(main)
"""
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True)

    done = ends("signal.raise_signal(signal.SIGINT)")
    assert done.returncode == 130 and done.stderr == "interrupted; the same command continues\n"
    done = ends("signal.raise_signal(signal.SIGTERM)")
    assert done.returncode == 143 and done.stderr == ""
    read, write_end = os.pipe()
    os.close(read)
    with os.fdopen(write_end, "w") as closed:
        done = ends("print('x' * 100000)", closed)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("kind", ["play", "noisy"])
@pytest.mark.parametrize("name", ["cube-single", "cube-double", "scene", "puzzle-3x3"])
def test_manipulation_episodes_depend_on_their_seed_alone(tmp_path, monkeypatch, name, kind):
    """30 rows of episode 1, made first and made after another episode."""
    pytest.importorskip("ogbench")
    from common.recipes import ogbench as recipes

    recipe = recipes.RECIPES[f"{name}-{kind}-v0"]._replace(steps=30)
    monkeypatch.setitem(recipes.RECIPES, f"{name}-{kind}-v0", recipe)
    made = []
    for order in ((1,), (0, 1)):
        folder = tmp_path / str(len(order))
        folder.mkdir()
        recipes._start(f"{name}-{kind}-v0", folder) if len(order) == 1 else None
        recipes._worker["parts"] = folder
        for index in order:
            recipes._make_part(("train", index))
        with np.load(folder / "train-00001.npz") as file:
            made.append({key: file[key] for key in file})
    first, second = made
    assert first.keys() == second.keys() and len(first["actions"]) == 30
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert ("button_states" in first) == (name in ("scene", "puzzle-3x3"))
    assert np.abs(first["actions"]).max() <= 1 and first["terminals"].sum() == 1


def test_recipes_command_line(capsys):
    from common.recipes import __main__ as command

    text = error_of(capsys, command.main, ["local/ogbench/cube-singel-play-v0"])
    assert "did you mean local/ogbench/cube-single-play-v0" in text
    text = error_of(capsys, command.main, ["local/pointmaze/umaze-v0", "--episodes", "0"])
    assert "--episodes 0: must be at least 1" in text
