# The stub's $stdenv/setup: the programs of nixpkgs' stdenv, then those of the inputs. In a shell the
# host's own stand behind them, as with `nix develop`; in a build there is nothing else.
_path=$stdenv/bin
for _input in ${nativeBuildInputs:-} ${propagatedBuildInputs:-}; do
    _path=$_input/bin:$_path
done
if [ -n "${IN_NIX_SHELL:-}" ]; then
    _path=$_path:/usr/local/bin:/usr/bin:/bin
fi
PATH=$_path
unset _input _path
export PATH TMPDIR="${TMPDIR:-/tmp}"
