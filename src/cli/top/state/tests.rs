use serde_json::json;

use super::*;

/// Two nodes, each with the lanes `grpc` and `nats` that are up.
fn two_nodes() -> TopState {
    let mut state = TopState::new(vec!["http://a/".into(), "http://b/".into()]);
    for node in [0, 1] {
        tell(&mut state, node, "up");
    }
    state
}

/// The node tells that its lane `nats` has this state.
fn tell(state: &mut TopState, node: usize, nats: &str) {
    let lane = |lane: &str, state: &str| LaneSummary {
        lane: lane.into(),
        state: state.into(),
        ..LaneSummary::default()
    };
    let status = NodeSummary {
        lanes: vec![lane("grpc", "up"), lane("nats", nats)],
        ..NodeSummary::default()
    };
    state.hear(node, NodeNews::Status(Box::new(status)));
}

fn press(state: &mut TopState, keys: &[KeyCode]) -> Wanted {
    let mut wanted = Wanted::Nothing;
    for key in keys {
        state.told = None;
        wanted = state.press((*key).into());
    }
    wanted
}

fn chosen(state: &TopState) -> (usize, &str) {
    let key = state.chosen.as_ref().expect("a lane is chosen");
    (key.node, &key.lane)
}

const DOWN: KeyCode = KeyCode::Down;

#[test]
fn letters_are_shown_under_the_name_of_their_node_alone() {
    let mut state = two_nodes();
    let wanted = press(&mut state, &[KeyCode::Char('d')]);
    assert_eq!(wanted, Wanted::Letters(0));
    let wanted = press(
        &mut state,
        &[KeyCode::Esc, KeyCode::End, KeyCode::Char('d')],
    );
    assert_eq!(wanted, Wanted::Letters(1));
    let letters = |number: u32| Ok(json!({ "total": number }));
    let shown = |shown| Screen::Letters { of: 1, shown };
    state.hear(0, NodeNews::Letters(letters(1)));
    assert_eq!(state.screen, shown(None));
    state.hear(1, NodeNews::Letters(letters(2)));
    assert_eq!(state.screen, shown(Some(letters(2))));
    state.hear(0, NodeNews::Letters(letters(3)));
    assert_eq!(state.screen, shown(Some(letters(2))));
    assert_eq!(press(&mut state, &[KeyCode::Char('d')]), Wanted::Letters(1));
}

#[test]
fn a_choice_stays_with_its_lane_while_the_filter_hides_it() {
    let mut state = two_nodes();
    let slash_up = "/up".chars().map(KeyCode::Char);
    let keys: Vec<_> = slash_up.chain([KeyCode::Enter, DOWN]).collect();
    press(&mut state, &keys);
    assert_eq!((chosen(&state), state.rows().len()), ((0, "nats"), 4));
    tell(&mut state, 0, "backoff");
    assert_eq!((chosen(&state), state.rows().len()), ((0, "nats"), 3));
    for order in ['R', 'p'] {
        press(&mut state, &[KeyCode::Char(order)]);
        assert_eq!(state.screen, Screen::Lanes, "{order}");
        assert!(state.told.is_some(), "{order}");
    }
    press(&mut state, &[KeyCode::Enter]);
    assert_eq!(state.screen, Screen::Lanes);
    tell(&mut state, 0, "up");
    assert_eq!(state.chosen_row(), Some(1));
    press(&mut state, &[KeyCode::Char('R')]);
    let of = LaneKey {
        node: 0,
        lane: "nats".into(),
    };
    let action = "restart";
    assert_eq!(state.screen, Screen::Confirm(LaneOrder { of, action }));
}

#[test]
fn a_choice_without_a_row_goes_to_the_first_one_with_the_next_step() {
    for (key, row) in [
        (DOWN, 0),
        (KeyCode::Up, 0),
        (KeyCode::Home, 0),
        (KeyCode::End, 2),
    ] {
        let mut state = two_nodes();
        let slash_up = "/up".chars().map(KeyCode::Char);
        let keys: Vec<_> = slash_up.chain([KeyCode::Enter, DOWN]).collect();
        press(&mut state, &keys);
        tell(&mut state, 0, "backoff");
        press(&mut state, &[key]);
        assert_eq!(state.chosen_row(), Some(row), "{key:?}");
    }
    // A typed filter means its rows.
    let mut state = two_nodes();
    let keys: Vec<_> = "/nats".chars().map(KeyCode::Char).collect();
    press(&mut state, &keys);
    assert_eq!(chosen(&state), (0, "nats"));
    press(&mut state, &[KeyCode::Char('x'), KeyCode::Esc]);
    assert_eq!(chosen(&state), (0, "nats"), "a filter without rows");
}

#[test]
fn the_first_row_is_chosen_until_a_key_is_pressed() {
    let mut state = two_nodes();
    state.filter = "up".into();
    assert_eq!(chosen(&state), (0, "grpc"));
    state.is_reversed = true;
    state.filter = "nats".into();
    tell(&mut state, 1, "up");
    assert_eq!(state.chosen_row(), Some(0));
}
