"""Every environment that ships is a start, not a trap: it is valid as it stands, and as the base of a new one."""

from __future__ import annotations

from control_world import ServerProcess

JSON = {"Accept": "application/json"}


def test_each_shipped_example_is_valid_and_makes_an_environment(shared_server: ServerProcess) -> None:
    http = shared_server.http
    listed = http.get("/api/configs/examples").json()
    assert listed["count"] == len(listed["examples"]) >= 2
    for example in listed["examples"]:
        assert example["description"]
        assert example["has_dataloader"]
        name = f"from-{example['name']}"
        defaults = example["defaults"]
        identity = {
            "model_family": defaults["--model_family"],
            "model_flavour": defaults["--model_flavour"],
            "model_type": defaults["--model_type"],
        }
        made = http.post("/api/configs/environments", json={"name": name, "example": example["name"], **identity})
        assert made.status_code == 201, made.text
        kept = {option: value for option, value in defaults.items() if option not in made.json()["config"]}
        assert not kept
        verdict = http.post(f"/api/training/validate?environment={name}", json={"--seed": 1}, headers=JSON)
        assert verdict.status_code == 200, verdict.text
        assert {item["code"] for item in verdict.json()["warnings"]} <= {"dataset_path_missing"}
