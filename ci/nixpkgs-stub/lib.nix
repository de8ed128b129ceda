# The part of nixpkgs' lib that megamoe's flake uses, written anew. Options: modules.nix.
let
  inherit (builtins)
    attrNames
    compareVersions
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    genList
    isAttrs
    isList
    isString
    listToAttrs
    mapAttrs
    stringLength
    substring
    ;
in
rec {
  nameValuePair = name: value: { inherit name value; };
  genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
  concatMapAttrs = f: set: foldl' (all: name: all // f name set.${name}) { } (attrNames set);
  recursiveUpdate =
    a: b:
    a
    // mapAttrs (
      name: value:
      if isAttrs value && isAttrs (a.${name} or null) then
        recursiveUpdate a.${name} value
      else if isList value && isList (a.${name} or null) then
        a.${name} ++ value
      else
        value
    ) b;
  inherit listToAttrs mapAttrs concatStringsSep;

  # What nixpkgs has, and where that was read.
  facts = builtins.fromJSON (builtins.readFile ./facts.json);

  concatMap = builtins.concatMap;
  last = list: elemAt list (builtins.length list - 1);
  escapeRegex =
    let
      special = [
        "\\"
        "."
        "*"
        "+"
        "?"
        "("
        ")"
        "["
        "]"
        "{"
        "}"
        "|"
        "^"
        "$"
      ];
    in
    builtins.replaceStrings special (map (sign: "\\${sign}") special);
  hasInfix = part: text: builtins.length (builtins.split (escapeRegex part) text) > 1;
  range = first: last: genList (index: first + index) (last - first + 1);
  toList = value: if isList value then value else [ value ];
  findFirst =
    predicate: default: list:
    let
      matches = filter predicate list;
    in
    if matches == [ ] then default else elemAt matches 0;
  inherit (builtins) foldl';
  setAttrByPath = path: value: if path == [ ] then value else { ${builtins.head path} = setAttrByPath (builtins.tail path) value; };
  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: list: if condition then list else [ ];
  optionalAttrs = condition: set: if condition then set else { };
  optionalString = condition: text: if condition then text else "";

  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  removePrefix =
    prefix: text:
    if hasPrefix prefix text then substring (stringLength prefix) (stringLength text) text else text;
  hasSuffix =
    suffix: text:
    let
      start = stringLength text - stringLength suffix;
    in
    start >= 0 && substring start (stringLength suffix) text == suffix;
  removeSuffix =
    suffix: text:
    if hasSuffix suffix text then
      substring 0 (stringLength text - stringLength suffix) text
    else
      text;
  splitString = separator: text: filter isString (builtins.split (escapeRegex separator) text);
  versionOlder = a: b: compareVersions a b < 0;
  versionAtLeast = a: b: compareVersions a b >= 0;

  throwIf =
    condition: message: value:
    if condition then throw message else value;
  throwIfNot = condition: throwIf (!condition);

  # The first of these outputs that the package has, unless one was chosen already.
  getFirstOutput =
    candidates: package:
    let
      there = filter (output: package ? ${output}) candidates;
    in
    if package.outputSpecified or false || there == [ ] then
      package
    else
      package.${builtins.head there};
  getBin = getFirstOutput [
    "bin"
    "out"
  ];
  getLib = getFirstOutput [
    "lib"
    "out"
  ];
  getInclude = getFirstOutput [
    "include"
    "dev"
    "out"
  ];
  getExe = package: getExe' package (package.meta.mainProgram or package.pname or package.name);
  getExe' = package: program: "${getBin package}/bin/${program}";
  getName = package: package.pname or package.name;
  licenses = {
    mit.free = true;
    asl20.free = true;
    nvidiaCuda = {
      free = false;
      shortName = "CUDA EULA";
    };
    unfree = {
      free = false;
      shortName = "unfree";
    };
  };
  platforms.linux = [
    "x86_64-linux"
    "aarch64-linux"
  ];

  fileset = {
    unions = paths: paths;
    maybeMissing = path: path;
    toSource =
      { root, fileset }:
      builtins.path {
        path = root;
        name = "source";
        filter =
          path: _:
          builtins.any (
            wanted:
            path == toString wanted
            || hasPrefix (toString wanted + "/") path
            || hasPrefix (path + "/") (toString wanted)
          ) fileset;
      };
  };
}
// import ./modules.nix
