"""Services get the launcher's environment without what belongs to another job or changes Python under us."""

from __future__ import annotations

import os

from services.launcher.environment import job_variables, service_environment


def test_the_variables_of_a_job_around_the_run_are_left_out() -> None:
    around = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "m",
        "TORCHELASTIC_RUN_ID": "x",
        "OMPI_COMM_WORLD_RANK": "1",
    }
    mine = {"HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "1", "http_proxy": "http://proxy", "OMP_NUM_THREADS": "2"}
    assert job_variables({**mine, **around}) == sorted(around)
    passed = service_environment({**mine, **around})
    assert mine.items() <= passed.items()
    assert not set(around) & set(passed)


def test_switches_that_change_python_are_left_out_and_text_is_utf_8() -> None:
    passed = service_environment({"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii"})
    assert passed == {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}


def test_no_entry_of_the_module_path_means_the_working_directory() -> None:
    path = os.pathsep.join(["", "/mine", "", "/yours"])
    assert service_environment({"PYTHONPATH": path})["PYTHONPATH"] == os.pathsep.join(["/mine", "/yours"])
    assert "PYTHONPATH" not in service_environment({"PYTHONPATH": os.pathsep})
