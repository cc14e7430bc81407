"""ComfyUI's folders, all below one."""

import os

_EXTENSIONS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
_FOLDERS = {
    "vae": ["vae"],
    "text_encoders": ["text_encoders", "clip"],
    "diffusion_models": ["unet", "diffusion_models"],
    "custom_nodes": ["../custom_nodes"],
}
base_path = models_dir = ""
folder_names_and_paths = {}


def use_base(base):
    """Not ComfyUI's own: what its --base-directory does."""
    global base_path, models_dir
    base_path, models_dir = str(base), os.path.join(base, "models")
    for name, below in _FOLDERS.items():
        folder_names_and_paths[name] = ([os.path.normpath(os.path.join(models_dir, f)) for f in below], _EXTENSIONS)


def get_user_directory():
    return os.path.join(base_path, "user")


def get_temp_directory():
    return os.path.join(base_path, "temp")


def get_input_directory():
    return os.path.join(base_path, "input")


def get_output_directory():
    return os.path.join(base_path, "output")


def add_model_folder_path(folder_name, full_folder_path, is_default=False):
    paths, _ = folder_names_and_paths.setdefault(folder_name, ([], set()))
    if full_folder_path not in paths:
        paths.insert(0 if is_default else len(paths), full_folder_path)


def get_folder_paths(folder_name):
    return list(folder_names_and_paths[folder_name][0])


def get_filename_list(folder_name):
    """Files below a kind's folders, by relative path in the system's own spelling; links are followed."""
    folders, extensions = folder_names_and_paths[folder_name]
    return sorted(
        {
            os.path.relpath(os.path.join(place, file), folder)
            for folder in folders
            for place, _, files in os.walk(folder, followlinks=True)
            for file in files
            if not extensions or os.path.splitext(file)[1].lower() in extensions
        }
    )


def get_full_path(folder_name, filename):
    candidates = (os.path.join(folder, filename) for folder in get_folder_paths(folder_name))
    return next((path for path in candidates if os.path.isfile(path)), None)


def get_full_path_or_raise(folder_name, filename):
    path = get_full_path(folder_name, filename)
    if path is None:
        raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found.")
    return path


def get_annotated_filepath(name, default_dir=None):
    return os.path.join(default_dir or get_input_directory(), name)
