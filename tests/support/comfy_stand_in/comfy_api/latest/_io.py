"""Schemas of V3 nodes, as strict as ComfyUI 0.3.64: a keyword that it does not know is a TypeError."""

from dataclasses import dataclass
from enum import Enum

_COMMON = "display_name optional tooltip lazy"
_WIDGET = "default socketless"
_NAMES = {"force_input": "forceInput", "dynamic_prompts": "dynamicPrompts", "display_mode": "display"}


class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"


class Input:
    """One input; its attributes are the keywords it was made with."""

    io_type = "*"
    keywords = f"{_COMMON} extra_dict"

    def __init__(self, id, *, extra_dict=None, **options):
        known = self.keywords.split()
        if unknown := set(options) - set(known):
            raise TypeError(f"{self.io_type}.Input() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        if extra_dict is not None and "extra_dict" not in known:
            raise TypeError(f"{self.io_type}.Input() got an unexpected keyword argument 'extra_dict'")
        self.__dict__ |= dict.fromkeys(known) | options | {"id": id, "extra_dict": extra_dict or {}}
        self.optional = bool(self.optional)

    def get_io_type(self):
        return self.io_type

    def as_dict(self):
        named = {name: getattr(self, name) for name in self.keywords.split() if name not in ("extra_dict", "optional")}
        return {_NAMES.get(k, k): v for k, v in named.items() if v is not None} | self.extra_dict


class Output:
    io_type = "*"

    def __init__(self, id=None, display_name=None, tooltip=None, is_output_list=False):
        self.id, self.display_name, self.tooltip, self.is_output_list = id, display_name, tooltip, is_output_list


def Custom(io_type, keywords=None):
    own = {"io_type": io_type} | ({"keywords": f"{_COMMON} {_WIDGET} {keywords}"} if keywords else {})
    inner = {"Input": type("Input", (Input,), own), "Output": type("Output", (Output,), {"io_type": io_type})}
    return type(io_type.title(), (), {"io_type": io_type, **inner})


Boolean = Custom("BOOLEAN", "label_on label_off force_input")
Int = Custom("INT", "min max step control_after_generate display_mode force_input")
Float = Custom("FLOAT", "min max step round display_mode force_input")
String = Custom("STRING", "multiline placeholder dynamic_prompts force_input")
Combo = Custom("COMBO", "options control_after_generate upload image_folder remote")
Image, Mask, Latent, Vae, Clip = (Custom(name) for name in ("IMAGE", "MASK", "LATENT", "VAE", "CLIP"))
Conditioning, Video, Audio, Model = (Custom(name) for name in ("CONDITIONING", "VIDEO", "AUDIO", "MODEL"))
AnyType = Custom("*")


class _ComboInput(Combo.Input):
    def __init__(self, id, options=None, **keywords):
        super().__init__(id, options=options, **keywords)


Combo.Input = _ComboInput


class MultiType:
    class Input(Input):
        """One socket for several types."""

        def __init__(self, id, types, **keywords):
            super().__init__(id, **keywords)
            self.io_types = types

        def get_io_type(self):
            return ",".join(dict.fromkeys(t.io_type for t in self.io_types))


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list | None = None
    outputs: list | None = None
    hidden: list | None = None
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False

    def check(self):
        ids = [part.id for part in [*(self.inputs or []), *(self.outputs or [])] if part.id is not None]
        if twice := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"{self.node_id}: ids of inputs and outputs must be unique, but {twice} are not.")


class _HiddenValues:
    def __init__(self, values):
        self.__dict__ |= {key.name: value for key, value in (values or {}).items()}

    def __getattr__(self, name):
        return None


class _Locked(type):
    def __setattr__(cls, name, value):
        raise AttributeError(f"Cannot modify class attribute {name!r} on locked class {cls.__name__!r}")


class ComfyNode:
    """Base of all nodes: never instantiated by a node's own code, state on the class is refused while it runs."""

    hidden = None

    @classmethod
    def GET_SCHEMA(cls):
        schema = cls.define_schema()
        schema.check()
        return schema

    @classmethod
    def GET_NODE_INFO_V1(cls):
        """What the front end gets, as a dict."""
        schema, inputs = cls.GET_SCHEMA(), {"required": {}}
        for i in schema.inputs or []:
            inputs.setdefault("optional" if i.optional else "required", {})[i.id] = (i.get_io_type(), i.as_dict())
        if schema.hidden:
            inputs["hidden"] = {h.name: (h.value,) for h in schema.hidden}
        outputs = schema.outputs or []
        return {
            "input": inputs,
            "output": [o.io_type for o in outputs],
            "output_name": [o.display_name or o.io_type for o in outputs],
            "output_tooltips": [o.tooltip for o in outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "category": schema.category,
            "output_node": schema.is_output_node,
        }

    @classmethod
    def PREPARE_CLASS_CLONE(cls, hidden):
        """The class to run on, with the hidden values, and locked."""
        return _Locked(cls.__name__, (cls,), {"hidden": _HiddenValues(hidden)})


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution

    @property
    def result(self):
        return self.args or None

    def __getitem__(self, index):
        return self.args[index]
