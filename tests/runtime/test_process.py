"""The manifest's `process` section."""

import json
from pathlib import Path

import pytest

from dit_runtime.errors import BundleError, UsageError
from dit_runtime.facts import FACTS
from dit_runtime.sampling.process import CHOICES, Process, Sampler, require_fit
from dit_runtime.sampling.solvers import EVALUATIONS, METHODS

FLOW = Process(
    prediction="velocity",
    shift=3.0,
    shift_growth=-0.01,
    shift_terminal=0.1,
    sampler=Sampler("heun", flow_spacing="linspace"),
)


def test_the_manifest_section_survives_json():
    sampler = Sampler(solver="dpm++3", lambda_min_clipped=-5.1, clip_sample=True, dpm_spacing="trailing")
    process = Process(train_steps=3, trained_betas=(0.1, 0.2, 0.3), prediction="v_prediction", sampler=sampler)
    for each in (process, Process(), FLOW):
        assert Process.from_dict(json.loads(json.dumps(each.to_dict(), allow_nan=False))) == each
    assert Process.from_dict({}) == Process()


def test_a_flow_holds_its_own_fields_alone():
    table = FLOW.to_dict()
    assert table == {
        "kind": "flow",
        "train_steps": 1000,
        "sampler": {
            "solver": "heun",
            "steps": 25,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "euler_at_final": False,
            "flow_spacing": "linspace",
            "flow_curve": "none",
        },
        "shift": 3.0,
        "shift_growth": -0.01,
        "shift_terminal": 0.1,
        "sigma_min": 0.001,
    }
    assert Process().to_dict()["kind"] == "noise" and not {"shift", "sigma_min"} & Process().to_dict().keys()
    assert Process.from_dict({"kind": "flow"}) == Process(prediction="velocity", sampler=Sampler(solver="euler"))
    assert (FLOW.span, Process(train_steps=500).span) == (1.0, 500.0) and not len(FLOW.betas)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"train_step": 10},
            "process: unknown key 'train_step' .*\"train_steps\".*known: kind, train_steps, prediction",
        ),
        ({"sampler": {"solvr": 1}}, r"process.sampler: unknown key 'solvr' \(did you mean \"solver\""),
        ({"sampler": 3}, "process.sampler is 3"),
        ({"sampler": {"solver": "eular"}}, "solver is 'eular'; expected one of ddpm, ddim"),
        ({"sampler": {"solver": "euler"}}, "solver 'euler' does not fit a model that predicts epsilon; take .* ddim"),
        ({"kind": "flows"}, "process: kind is 'flows'; expected one of noise, flow"),
        ({"kind": ["flow"]}, r"process: kind is \['flow'\]"),
        ({"prediction": "velocity", "sampler": {"solver": "heun"}}, "fits kind flow, not noise"),
        ({"shift": 3.0}, "process: unknown key 'shift'"),
        ({"sampler": {"flow_spacing": "trailing"}}, "process.sampler: unknown key 'flow_spacing'"),
        ({"kind": "flow", "beta_start": 0.1}, "unknown key 'beta_start'; known: kind, train_steps, shift"),
        ({"kind": "flow", "prediction": "velocity"}, "unknown key 'prediction'"),
        ({"kind": "flow", "sampler": {"clip_sample": True}}, "process.sampler: unknown key 'clip_sample'"),
        ({"kind": "flow", "sampler": {"solver": "ddim"}}, "'ddim' does not fit a model that predicts velocity; take"),
        ({"kind": "flow", "sampler": {"flow_spacing": "leading"}}, "flow_spacing is 'leading'; expected one of trail"),
        ({"kind": "flow", "shift": 0}, "shift is 0; expected a number above 0"),
        ({"kind": "flow", "shift_growth": -0.11}, "shift_growth is -0.11; expected at most 0.1 either way"),
        ({"kind": "flow", "shift_growth": 0.01, "train_steps": 20000}, "shift_growth is 0.01; expected at most 0.005"),
        ({"kind": "flow", "shift_growth": None}, "shift_growth is None; expected a finite number"),
        ({"kind": "flow", "shift_terminal": 1}, "shift_terminal is 1; expected a number between 0 and 1"),
        ({"kind": "flow", "sigma_min": 0}, "sigma_min is 0; expected a number between 0 and 1"),
        ({"sampler": {"steps_offset": -1}}, "steps_offset is -1; expected an integer from 0"),
        ({"sampler": {"clip_sample": "no"}}, "clip_sample is 'no'; expected true or false"),
        ({"sampler": {"lambda_min_clipped": float("-inf")}}, "lambda_min_clipped is -inf"),
        ({"sampler": {"variance": ["learned"]}}, "variance is"),
        ({"train_steps": 1}, "train_steps is 1; expected an integer from 2"),
        ({"train_steps": 10.5}, "train_steps is 10.5; expected an integer"),
        ({"beta_end": 1}, "beta_end is 1; expected a number between 0 and 1"),
        ({"beta_start": float("nan")}, "beta_start is nan"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; expected one of linear"),
        ({"trained_betas": [0.1]}, "trained_betas is '1 values'; expected 1000"),
        ({"train_steps": 2, "trained_betas": [0.1, 2]}, "trained_betas is 2; expected numbers between 0 and 1"),
        ({"train_steps": 2, "trained_betas": 0.1}, "trained_betas is 0.1; expected numbers"),
    ],
)
def test_a_damaged_section_is_refused(table, message):
    with pytest.raises(BundleError, match=message):
        Process.from_dict(table)


def test_every_solver_of_the_facts_has_its_code():
    assert METHODS.keys() == EVALUATIONS.keys() == FACTS["solvers"].keys()
    for solver, facts in FACTS["solvers"].items():
        for process in (Process(), FLOW):
            if process.kind in facts["processes"]:
                require_fit(process, solver)
            else:
                with pytest.raises(UsageError, match="does not fit a model that predicts"):
                    require_fit(process, solver)


@pytest.mark.parametrize("process", [Process(), FLOW])
def test_the_schema_names_every_field_and_choice(process):
    """manifest.schema.json is for other readers; it says the same."""
    schema = json.loads((Path(__file__).parents[2] / "runtime/manifest.schema.json").read_text())["$defs"]
    table, fields = process.to_dict(), schema[process.kind]["properties"]
    sampler = fields["sampler"]["properties"]
    assert fields.keys() == table.keys() and sampler.keys() == table["sampler"].keys()
    assert fields["kind"]["const"] == process.kind
    of_kind = [name for name, facts in FACTS["solvers"].items() if process.kind in facts["processes"]]
    assert sampler["solver"]["enum"] == of_kind
    spacing = schema["noise_spacing"] if process.kind == "noise" else sampler["flow_spacing"]
    assert spacing["enum"] + (FACTS["curves"] if process.kind == "flow" else []) == FACTS["spacings"][process.kind]
    choices = {**fields, **sampler, "solver_type": schema["solver_type"]}
    names = ("beta_schedule", "variance", "solver_type", "flow_spacing", "flow_curve")
    assert all(choices[key]["enum"] == [*CHOICES[key]] for key in names if key in choices)
