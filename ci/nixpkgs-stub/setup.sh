# The stub's $stdenv/setup: tools of the host, then the bin folders of the inputs.
PATH=/usr/local/bin:/usr/bin:/bin
for _input in $nativeBuildInputs; do
    PATH=$_input/bin:$PATH
done
unset _input
export PATH TMPDIR="${TMPDIR:-/tmp}"
