# Modules as NixOS evaluates them, as far as the flake needs: options with types; definitions of
# equal priority join or contradict each other; an option that nobody declares is an error.
let
  inherit (builtins)
    attrNames
    concatMap
    concatStringsSep
    elem
    filter
    foldl'
    genList
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    substring
    tail
    ;

  typed = type: value: isAttrs value && value._type or "" == type;
  isPackage = value: isAttrs value && value ? drvPath;

  # Several definitions that must be the same.
  same =
    path: values:
    if filter (value: value != head values) values == [ ] then
      head values
    else
      throw "The option `${path}' has conflicting definition values";
  simple = name: check: {
    inherit name check;
    merge = same;
  };
  types = rec {
    bool = simple "boolean" isBool;
    int = simple "integer" isInt;
    str = simple "string" isString;
    path = simple "absolute path" (
      value: isPath value || isPackage value || (isString value && substring 0 1 value == "/")
    );
    package = simple "package" isPackage;
    unspecified = simple "anything" (_: true);
    enum = values: simple "one of ${builtins.toJSON values}" (value: elem value values);
    nullOr =
      type:
      type
      // {
        name = "null or ${type.name}";
        check = value: value == null || type.check value;
      };
    listOf = type: {
      name = "list of ${type.name}";
      check = value: isList value && filter (element: !type.check element) value == [ ];
      merge = _: concatMap (value: value);
    };
    attrs = {
      name = "attribute set";
      check = isAttrs;
      merge = _: foldl' (all: value: all // value) { };
    };
    attrsOf = type: {
      name = "attribute set of ${type.name}";
      check = isAttrs;
      merge =
        path: values:
        listToAttrs (
          map (name: {
            inherit name;
            value = type.merge "${path}.${name}" (
              concatMap (value: if value ? ${name} then [ value.${name} ] else [ ]) values
            );
          }) (concatMap attrNames values)
        );
    };
    submodule = module: {
      name = "submodule";
      check = isAttrs;
      merge = path: values: (evaluate path { } ([ module ] ++ map (config: { inherit config; }) values)).config;
    };
  };

  # Options of a tree, as { path; option; }.
  optionsOf =
    prefix: tree:
    concatMap (
      name:
      let
        path = prefix ++ [ name ];
      in
      if typed "option" tree.${name} then
        [
          {
            inherit path;
            option = tree.${name};
          }
        ]
      else
        optionsOf path tree.${name}
    ) (attrNames tree);

  # What `value` defines at `path`. A condition is looked at where its content defines it, not before:
  # it may ask for other options.
  definitionsAt =
    path: value:
    if typed "if" value then
      let
        definitions = definitionsAt path value.content;
      in
      if definitions != [ ] && value.condition then definitions else [ ]
    else if typed "merge" value then
      concatMap (definitionsAt path) value.contents
    else if path == [ ] then
      [ value ]
    else if value ? ${head path} then
      definitionsAt (tail path) value.${head path}
    else
      [ ];

  # Dotted names that `value` defines and nobody declares.
  unknown =
    paths: prefix: value:
    if typed "if" value then
      unknown paths prefix value.content
    else if typed "merge" value then
      concatMap (unknown paths prefix) value.contents
    else if elem prefix paths then
      [ ]
    else if isAttrs value && builtins.any (path: isPrefix prefix path) paths then
      concatMap (name: unknown paths (prefix ++ [ name ]) value.${name}) (attrNames value)
    else
      [ (concatStringsSep "." prefix) ];
  isPrefix = part: path: length part < length path && part == genList (builtins.elemAt path) (length part);

  priorityOf = value: if typed "override" value then value.priority else 100;
  contentOf = value: if typed "override" value then value.content else value;

  valueOf =
    name: option: definitions:
    let
      least = foldl' (a: b: if b < a then b else a) 10000 (map priorityOf definitions);
      chosen = map contentOf (filter (value: priorityOf value == least) definitions);
    in
    if option.readOnly or false && length definitions > 1 then
      throw "The option `${name}' is read-only, but it's set multiple times."
    else if definitions == [ ] then
      option.default or (throw "The option `${name}' was accessed but has no value defined.")
    else if filter (value: !option.type.check value) chosen != [ ] then
      throw "A definition for option `${name}' is not of type `${option.type.name}'."
    else
      option.type.merge name chosen;

  # Of { path; option; } an attribute set, in which no value is looked at.
  treeOf =
    make: prefix: declarations:
    if length declarations == 1 && (head declarations).path == prefix then
      make (head declarations)
    else
      listToAttrs (
        map (name: {
          inherit name;
          value = treeOf make (prefix ++ [ name ]) (
            filter ({ path, ... }: builtins.elemAt path (length prefix) == name) declarations
          );
        }) (map ({ path, ... }: builtins.elemAt path (length prefix)) declarations)
      );

  evaluate =
    where: arguments: modules:
    let
      contents = map (
        module:
        let
          content = if isFunction module then module (arguments // { inherit config; }) else module;
        in
        if content ? options || content ? config then content else { config = content; }
      ) modules;
      declarations = concatMap (module: optionsOf [ ] (module.options or { })) contents;
      definitions = map (module: module.config or { }) contents;
      make =
        { path, option }:
        valueOf "${where}.${concatStringsSep "." path}" option (concatMap (definitionsAt path) definitions);
      config = treeOf make [ ] declarations;
      foreign = concatMap (unknown (map ({ path, ... }: path) declarations) [ ]) definitions;
    in
    {
      config =
        if foreign == [ ] then
          config
        else
          throw "The option `${where}.${head foreign}' does not exist.";
    };
in
{
  inherit types;
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkDefault = content: {
    _type = "override";
    priority = 1000;
    inherit content;
  };
  mkForce = content: {
    _type = "override";
    priority = 50;
    inherit content;
  };
  mkOption = option: option // { _type = "option"; };
  mkEnableOption = description: {
    _type = "option";
    type = types.bool;
    default = false;
    inherit description;
  };
  evalModules =
    {
      modules,
      specialArgs ? { },
    }:
    evaluate "nixos" (specialArgs // { lib = import ./lib.nix; }) modules;
}
