"""templates/{poddisruptionbudget,configmap,keys-job}.yaml and NOTES.txt."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from models.pool import DEFAULT_POOL
from router.cli.keys import app as keys_app
from router.config import load_args
from tests.helm.helm_chart import CHART, example, notes, one, render
from tests.helm.kubernetes import check, pod_templates


def test_the_disruption_budget_holds_workers_back() -> None:
    """It matches workers, not the head, which alone would block every drain."""
    manifests = render()
    budget = one(manifests, "poddisruptionbudget.yaml")
    check(budget)
    assert budget["spec"]["maxUnavailable"] == 1
    wanted = budget["spec"]["selector"]["matchLabels"].items()
    head, worker = pod_templates(one(manifests, "rayservice.yaml"))
    assert wanted <= worker["metadata"]["labels"].items()
    assert not wanted <= head["metadata"]["labels"].items()
    assert "poddisruptionbudget.yaml" not in render(example("cpu-demo"))


def test_the_config_map_is_a_configuration_for_the_commands(tmp_path: Path) -> None:
    """`shoal ... --config` on the head reads what the server was given."""
    manifests = render(example("one-gpu"), sets=(f"pool.mountPath={DEFAULT_POOL}",))
    config_map = one(manifests, "configmap.yaml")
    check(config_map)
    file = tmp_path / "shoal.yaml"
    file.write_text(config_map["data"]["shoal.yaml"])
    serve = yaml.safe_load(one(manifests, "rayservice.yaml")["spec"]["serveConfigV2"])
    assert yaml.safe_load(file.read_text()) == serve["applications"][0]["args"]
    assert load_args(file).auth.required
    head = pod_templates(one(manifests, "rayservice.yaml"))[0]["spec"]
    assert {"name": "config", "mountPath": "/etc/shoal", "readOnly": True} in head["containers"][0][
        "volumeMounts"
    ]
    [volume] = [volume for volume in head["volumes"] if volume["name"] == "config"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]


def test_the_keys_job_runs_a_command_that_exists(tmp_path: Path) -> None:
    """After install and upgrade it imports the secret's keys, with the database's password."""
    job = one(render(example("one-gpu")), "keys-job.yaml")
    check(job)
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"
    spec = job["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"name": "PGPASSWORD"}.items() <= container["env"][-1].items()
    [secret] = [volume for volume in spec["volumes"] if volume["name"] == "keys"]
    assert secret["secret"]["secretName"] == "shoal-keys"
    # The same command, on a folder and a configuration of this machine.
    shoal, keys, *arguments = container["command"]
    assert (shoal, keys) == ("shoal", "keys")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "me.admin").write_text("sk-shoal-" + "x" * 40)
    (tmp_path / "shoal.yaml").write_text(f"ledger: {{url: 'sqlite:///{tmp_path}/shoal.db'}}\n")
    here = {"/etc/shoal-keys": tmp_path / "keys", "/etc/shoal/shoal.yaml": tmp_path / "shoal.yaml"}
    assert set(here) <= set(arguments)
    done = CliRunner().invoke(
        keys_app, [str(here.get(argument, argument)) for argument in arguments]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith("me: key_")
    assert "keys-job.yaml" not in render()


@pytest.mark.parametrize("name", ["cpu-demo", "one-gpu"])
def test_the_notes_say_what_to_do_next(name: str) -> None:
    """They name the service that KubeRay makes, and warn of what isn't safe yet."""
    text = notes(example(name))
    assert "port-forward svc/demo-shoal-serve-svc 8000:8000" in text
    assert ("No API key is asked for" in text) == (name == "cpu-demo")
    assert ("it is lost when that pod goes" in text) == (name == "cpu-demo")
    assert ("authorization: Bearer" in text) == (name == "one-gpu")


def test_long_names_stay_valid() -> None:
    """Whatever the release is called, names fit what Kubernetes and KubeRay allow."""
    for manifests in render(example("one-gpu"), release="r" * 53).values():
        for manifest in manifests:
            check(manifest)
            assert len(manifest["metadata"]["name"]) <= 63


def test_every_template_has_its_test() -> None:
    """A template that no test names is a template nobody looks at."""
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for template in (CHART / "templates").iterdir():
        if not template.name.startswith("_"):
            assert template.stem in tests or template.name in tests, template.name
