//! The configuration of two texts. The agent's crate compiles this as a part of `config`, in fuzzing builds only.

use super::{Config, ConfigError, Key, Origin, Values, validate};
use crate::sys::users::User;

/// [`super::load`] on a device where every shell exists and every user is `user`.
pub fn of_texts(main: &[u8], fallback: &[u8], user: &User) -> Result<Config, ConfigError> {
    let mut values = Values::default();
    for (text, origin) in [(fallback, Origin::Fallback), (main, Origin::Main)] {
        values.lay(text, origin)?.fit()?;
    }
    let values = values.filled();
    let user = User { name: values.text(Key::User).to_owned(), ..user.clone() };
    validate(&values, Ok(user)).map_err(|mut errors| errors.swap_remove(0))
}
