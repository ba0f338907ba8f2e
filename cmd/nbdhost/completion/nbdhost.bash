# Completion of nbdhost's command lines in bash:
#   nbdhost --completion=bash >/etc/bash_completion.d/nbdhost

_nbdhost() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} word files=
    local -a words=() found=()
    COMPREPLY=()

    # COMP_WORDS is no help: bash splits words at "=" and ":".
    IFS=$' \t\n' read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local cur=${words[${#words[@]} - 1]}

    while read -r word; do
        word=${word%%$'\t'*}
        if [[ $word == :files ]]; then files=1; else found+=("$word"); fi
    done < <("${words[0]}" --complete -- "${words[@]:1}" 2>/dev/null)

    # What bash replaces begins behind the last "=" or ":".
    local keep=${cur##*["${COMP_WORDBREAKS//[^=:]/}"]}
    local drop=${cur%"$keep"}
    for word in "${found[@]}"; do COMPREPLY+=("${word#"$drop"}"); done
    if [[ $files ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -f -- "$keep"))
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}

complete -F _nbdhost nbdhost nbdkit
