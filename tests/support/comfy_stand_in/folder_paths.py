"""ComfyUI's folders, all below one."""

import os
from pathlib import Path

_EXTENSIONS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
_FOLDERS = {
    "vae": ["vae"],
    "text_encoders": ["text_encoders", "clip"],
    "diffusion_models": ["unet", "diffusion_models"],
}
base_path = models_dir = ""
folder_names_and_paths = {}


def use_base(base):
    """Not ComfyUI's own: what its --base-directory does."""
    global base_path, models_dir
    base_path, models_dir = str(base), str(base / "models")
    for name, folders in _FOLDERS.items():
        folder_names_and_paths[name] = ([str(base / "models" / folder) for folder in folders], _EXTENSIONS)


def get_user_directory():
    return str(Path(base_path, "user"))


def get_input_directory():
    return str(Path(base_path, "input"))


def get_output_directory():
    return str(Path(base_path, "output"))


def get_temp_directory():
    return str(Path(base_path, "temp"))


def get_annotated_filepath(name):
    return str(Path(base_path, "input", name))


def add_model_folder_path(folder_name, full_folder_path, is_default=False):
    paths, _ = folder_names_and_paths.setdefault(folder_name, ([], set()))
    if full_folder_path not in paths:
        paths.insert(0 if is_default else len(paths), full_folder_path)


def get_folder_paths(folder_name):
    return list(folder_names_and_paths[folder_name][0])


def get_filename_list(folder_name):
    """Files below a kind's folders, by relative path in the system's own spelling; links are followed."""
    folders, extensions = folder_names_and_paths[folder_name]
    found = set()
    for folder in folders:
        for place, _, files in os.walk(folder, followlinks=True):
            paths = (Path(place, file) for file in files)
            found |= {str(p.relative_to(folder)) for p in paths if not extensions or p.suffix.lower() in extensions}
    return sorted(found)
