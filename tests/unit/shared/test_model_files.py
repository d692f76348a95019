from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from shared.errors import InvalidRequest
from shared.model_files import check_model_exists, take_chat_template


@pytest.fixture(autouse=True)
def _asked_anew():
    check_model_exists.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    """Let the hub answer with an error, or know everything."""

    def answer(error=None):
        def model_info(self, name, *, revision, timeout):
            if error:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)

    return answer


def hub_error(kind):
    return kind.__new__(kind)  # their constructors take a response


@pytest.mark.parametrize("holds", ["config.json", "params.json", "weights.gguf"])
def test_a_directory_that_holds_a_model(tmp_path, holds):
    (tmp_path / holds).touch()
    check_model_exists(str(tmp_path))


def test_what_others_look_at(tmp_path):
    (tmp_path / "model.gguf").touch()
    check_model_exists(str(tmp_path / "model.gguf"))
    check_model_exists("s3://bucket/model")
    check_model_exists(str(tmp_path), config_elsewhere=True)


def test_a_typo_in_a_path_names_the_nearest(tmp_path):
    (tmp_path / "qwen-0.5b").mkdir()
    with pytest.raises(InvalidRequest, match=f"there is no directory .*: did you mean {tmp_path}/qwen-0.5b?"):
        check_model_exists(str(tmp_path / "qwen-0.5"))


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=f"{tmp_path} has no elsewhere"):
        check_model_exists(str(tmp_path / "elsewhere" / "model"))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(InvalidRequest, match="is an adapter, not a model: name its base model"):
        check_model_exists(str(tmp_path))


def test_a_directory_above_the_model(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").touch()
    with pytest.raises(InvalidRequest, match=f"no config.json: did you mean {tmp_path}/inner?"):
        check_model_exists(str(tmp_path))


def test_a_model_of_the_hub(hub):
    hub()
    check_model_exists("owner/name")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(errors.RepositoryNotFoundError), "check the spelling; a private one needs"),
        (hub_error(errors.GatedRepoError), "is gated: accept its terms"),
        (hub_error(errors.RevisionNotFoundError), "has no revision 'v1'"),
        (OSError("no route to host"), r"the hub cannot be asked \(no route to host\): name a directory"),
    ],
)
def test_a_model_that_the_hub_does_not_give(hub, error, words):
    hub(error)
    with pytest.raises(InvalidRequest, match=words):
        check_model_exists("owner/name", "v1")


def test_one_of_the_gguf_files_of_a_repository(hub, monkeypatch):
    hub()
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **_: asked.append(name))
    check_model_exists("org/Model-GGUF:Q4_K_M")
    assert asked == ["org/Model-GGUF"]
    for name in ("org/Model-GGUF:", "Model:Q4", "org/Model:a:b"):
        with pytest.raises(InvalidRequest, match="a name that a hub could have"):
            check_model_exists(name)


def test_what_no_hub_could_have():
    with pytest.raises(InvalidRequest, match="neither a directory here nor a name that a hub could have"):
        check_model_exists("my model")


@pytest.mark.parametrize(("files", "template"), [
    ({}, None),
    ({"chat_template.json": {"chat_template": "json"}}, "json"),
    ({"chat_template.json": {"chat_template": "json"}, "processor_config.json": {}}, "json"),
    ({"chat_template.json": {"chat_template": "json"}, "processor_config.json": {"chat_template": "first"}}, "first"),
])  # fmt: skip
def test_a_tokenizer_without_a_template_takes_the_processors(tmp_path, files, template):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    without, with_one = SimpleNamespace(chat_template=None), SimpleNamespace(chat_template="own")
    seeing, of_another_kind = SimpleNamespace(chat_template="own"), SimpleNamespace()
    for tokenizer in (without, with_one, of_another_kind):
        take_chat_template(tokenizer, str(tmp_path), None)
    take_chat_template(seeing, str(tmp_path), None, sees=True)
    assert without.chat_template == template
    assert with_one.chat_template == "own"
    assert seeing.chat_template == (template or "own")
    assert of_another_kind == SimpleNamespace()


def test_the_processors_template_comes_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))

    def hf_hub_download(name, file, *, revision):
        if not (tmp_path / file).is_file() or (name, revision) != ("somebody/model", "main"):
            raise hub_error(errors.EntryNotFoundError)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    known, unknown = SimpleNamespace(chat_template=None), SimpleNamespace(chat_template=None)
    take_chat_template(known, "somebody/model", "main")
    take_chat_template(unknown, "somebody/else", "main")
    assert (known.chat_template, unknown.chat_template) == ("json", None)
