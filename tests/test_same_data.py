"""A run goes on over the same data, wherever they lie and however their folder is written; other data are refused."""

import shutil

import pytest
from conftest import run, same, weights

import train_prx as T
from data import shards


def test_the_same_folder_however_it_is_written_is_no_other_setting(in_tmp, scene_folder):
    shutil.copytree(scene_folder, "a,b:2")
    run("--data", "a,b:2", "--steps", 10, "--name", "whole")
    run("--data", "a,b:2", "--steps", 10, "--stop-after", 2, "--name", "r")
    for step, data in enumerate(["a,b:2/", "./a,b:2", in_tmp / "a,b:2", "a,b:2/../a,b:2"], 3):
        run("--data", data, "--steps", 10, "--stop-after", step, "--name", "r")
    shutil.move("a,b:2", "elsewhere")
    run("--data", "elsewhere", "--steps", 10, "--name", "r")
    assert same(weights("whole"), weights("r"))
    run("--data", "elsewhere/", "--steps", 10, "--name", "r")  # finished: said, and no other setting


def test_other_data_and_other_weights_are_refused(in_tmp, scene_folder, capsys):
    from data.scenes import write_track

    for name in ("a", "b", "c"):
        write_track("micro", in_tmp / name, n=64 if name == "c" else 128, eval_n=4, processes=1)
    start = ("--steps", 10, "--stop-after", 2, "--name", "r", "--data")
    run(*start, "a:0.5,b:0.5")
    for data in ("a:0.7,b:0.3", "a", "a:0.5,c:0.5"):
        run("--steps", 10, "--name", "r", "--data", data, code=2)
        message = capsys.readouterr().err
        assert "was trained on other data" in message and "--resume never" not in message and message.count("\n") == 1
    run("--steps", 10, "--name", "r", "--data", "a/:0.5,./b:0.5")


LISTS = ["a", "a:1", "a,b", "a:0.7,b:0.3", "run:2", "run:2:0.5,x,y:3,a", "A:.7", "x,y", "A:0", "A,,B", ""]


@pytest.mark.parametrize("data", LISTS)
def test_the_trainer_and_the_tools_read_a_list_of_folders_alike(in_tmp, data):
    for name in ("a", "run:2", "x,y:3", "x,y"):
        (in_tmp / name).mkdir()

    def read(function, error):
        try:
            return function(data)
        except error:
            return "refused"
    assert read(T.data_folders, T.UserError) == read(shards.data_folders, shards.UserError)
