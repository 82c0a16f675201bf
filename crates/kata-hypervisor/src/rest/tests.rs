use serde_json::json;

use super::fake::Interface;

fn interface() -> Interface {
    Interface::parse(
        "[[endpoints]]\nrequest = \"PUT /thing/{id}\"\nbody = \"Thing\"\nanswers = [204]\n\
         [[endpoints]]\nrequest = \"GET /\"\nanswers = [200]\n\
         [schemas.Thing]\nname = \"string!\"\nsize = \"integer\"\nparts = \"[Thing]\"\nkind = \"'A'|'B'\"\n",
    )
}

#[test]
fn requests_that_are_not_published_are_refused() {
    let interface = interface();
    let wrong = |request: &str, body: Option<&serde_json::Value>| interface.check(request, body).unwrap_err();
    assert_eq!(wrong("PUT /other", None), "PUT /other: no such request");
    assert_eq!(wrong("PUT /thing/", None), "PUT /thing/: no such request");
    assert_eq!(wrong("PUT /thing/1", None), "PUT /thing/1: the body is missing");
    assert_eq!(wrong("GET /", Some(&json!({}))), "GET /: takes no body");
    for (body, why) in [
        (json!({}), "PUT /thing/1.name: is missing"),
        (json!({"name": 1}), "PUT /thing/1.name: 1 is no string"),
        (json!({"name": "a", "size": -1}), "PUT /thing/1.size: -1 is no integer"),
        (json!({"name": "a", "nmae": "b"}), "PUT /thing/1.nmae: no such field"),
        (json!({"name": "a", "kind": "C"}), "PUT /thing/1.kind: \"C\" is no 'A'|'B'"),
        (json!({"name": "a", "parts": [{}]}), "PUT /thing/1.parts.name: is missing"),
    ] {
        assert_eq!(wrong("PUT /thing/1", Some(&body)), why);
    }
    let right = json!({"name": "a", "size": 1, "kind": "B", "parts": [{"name": "b"}]});
    assert_eq!(interface.check("PUT /thing/1", Some(&right)), Ok(()));
}
